//! A small XML document in memory: elements in their order, names and attributes as they were written.
//!
//! libvirt's documents are foreign: length and depth are bounded, document types are refused, and so are entities that
//! XML itself does not define. Comments and processing instructions are dropped.

use std::fmt::Write;

use quick_xml::Reader;
use quick_xml::XmlVersion;
use quick_xml::escape::escape;
use quick_xml::events::{BytesStart, Event};

/// No domain's description is longer.
pub const MAX_LENGTH: usize = 1 << 20;
/// No domain's description is deeper.
const MAX_DEPTH: usize = 64;

/// An element.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Element {
    /// As written, with its prefix.
    pub name: String,
    /// In their order, unescaped.
    pub attributes: Vec<(String, String)>,
    /// What it holds.
    pub children: Vec<Node>,
}

/// What an element holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// Another element.
    Element(Element),
    /// Text, unescaped.
    Text(String),
}

/// Why a document cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XmlError {
    /// Longer than [`MAX_LENGTH`].
    #[error("the description is longer than {MAX_LENGTH} bytes")]
    TooLong,
    /// Elements in elements in elements...
    #[error("the description's elements are nested deeper than {MAX_DEPTH}")]
    TooDeep,
    /// Not XML.
    #[error("the description is not XML that can be used, at byte {at}: {reason}")]
    Syntax {
        /// Where.
        at: u64,
        /// In the parser's words.
        reason: String,
    },
    /// XML, but of something else.
    #[error("the description is of a <{found}>, not of a <{wanted}>")]
    Root {
        /// Its outermost element.
        found: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// Something a domain cannot be without.
    #[error("the description has no <{what}>")]
    Missing {
        /// The element.
        what: &'static str,
    },
}

impl Element {
    /// An empty element.
    pub fn new(name: &str) -> Element {
        Element { name: name.to_owned(), ..Element::default() }
    }

    /// The same with an attribute.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Element {
        self.set(name, value);
        self
    }

    /// The same with an element in it.
    #[must_use]
    pub fn holding(mut self, child: Element) -> Element {
        self.children.push(Node::Element(child));
        self
    }

    /// The same with this text in it.
    #[must_use]
    pub fn saying(mut self, text: impl Into<String>) -> Element {
        self.children.push(Node::Text(text.into()));
        self
    }

    /// An attribute's value.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Sets an attribute.
    pub fn set(&mut self, name: &str, value: impl Into<String>) {
        let value = value.into();
        match self.attributes.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value,
            None => self.attributes.push((name.to_owned(), value)),
        }
    }

    /// The elements in it.
    pub fn elements(&self) -> impl Iterator<Item = &Element> {
        self.children.iter().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            Node::Text(_) => None,
        })
    }

    /// The same, to change them.
    pub fn elements_mut(&mut self) -> impl Iterator<Item = &mut Element> {
        self.children.iter_mut().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            Node::Text(_) => None,
        })
    }

    /// The first element of this name in it.
    pub fn child(&self, name: &str) -> Option<&Element> {
        self.elements().find(|element| element.name == name)
    }

    /// The same, to change it.
    pub fn child_mut(&mut self, name: &str) -> Option<&mut Element> {
        self.elements_mut().find(|element| element.name == name)
    }

    /// The element along a path of first children.
    pub fn at(&self, path: &[&str]) -> Option<&Element> {
        path.iter().try_fold(self, |element, name| element.child(name))
    }

    /// The text directly in it, without the blanks around.
    pub fn text(&self) -> String {
        let texts = self.children.iter().filter_map(|node| match node {
            Node::Text(text) => Some(text.as_str()),
            Node::Element(_) => None,
        });
        texts.collect::<String>().trim().to_owned()
    }

    /// Puts `child` in the place of all elements of its name.
    pub fn replace(&mut self, child: Element) {
        self.remove(&child.name.clone());
        self.children.push(Node::Element(child));
    }

    /// Removes all elements of this name; says whether there were any.
    pub fn remove(&mut self, name: &str) -> bool {
        let before = self.children.len();
        self.retain(|element| element.name != name);
        self.children.len() < before
    }

    /// Keeps only these elements; text stays.
    pub fn retain(&mut self, mut keep: impl FnMut(&Element) -> bool) {
        self.children.retain(|node| match node {
            Node::Element(element) => keep(element),
            Node::Text(_) => true,
        });
    }

    /// Reads a document, whose outermost element must be `root`.
    pub fn parse(text: &str, root: &'static str) -> Result<Element, XmlError> {
        let found = parse(text)?;
        if found.name != root {
            return Err(XmlError::Root { found: found.name, wanted: root });
        }
        Ok(found)
    }

    /// The document, indented as libvirt does it.
    pub fn to_xml(&self) -> String {
        let mut text = String::new();
        write(self, 0, &mut text);
        text
    }
}

fn parse(text: &str) -> Result<Element, XmlError> {
    if text.len() > MAX_LENGTH {
        return Err(XmlError::TooLong);
    }
    let mut reader = Reader::from_str(text);
    reader.config_mut().enable_all_checks(true);
    let mut open: Vec<Element> = Vec::new();
    let mut root = None;
    loop {
        let at = reader.buffer_position();
        let wrong = |reason: &str| XmlError::Syntax { at, reason: reason.to_owned() };
        let event = reader.read_event().map_err(|error| wrong(&error.to_string()))?;
        let text = match event {
            Event::Start(tag) => {
                if root.is_some() {
                    return Err(wrong("more than one outermost element"));
                }
                if open.len() >= MAX_DEPTH {
                    return Err(XmlError::TooDeep);
                }
                open.push(element(&tag).map_err(|reason| wrong(&reason))?);
                continue;
            }
            Event::Empty(tag) => {
                if root.is_some() {
                    return Err(wrong("more than one outermost element"));
                }
                close(element(&tag).map_err(|reason| wrong(&reason))?, &mut open, &mut root);
                continue;
            }
            Event::End(_) => {
                let closed = open.pop().ok_or_else(|| wrong("an end without a beginning"))?;
                close(closed, &mut open, &mut root);
                continue;
            }
            Event::Text(text) => text.xml10_content().into_owned(),
            Event::CData(text) => text.xml10_content().into_owned(),
            Event::GeneralRef(name) => {
                let character = name.resolve_char_ref().map_err(|error| wrong(&error.to_string()))?;
                match (character, &*name.xml10_content()) {
                    (Some(character), _) => character.to_string(),
                    (None, "lt") => "<".to_owned(),
                    (None, "gt") => ">".to_owned(),
                    (None, "amp") => "&".to_owned(),
                    (None, "quot") => "\"".to_owned(),
                    (None, "apos") => "'".to_owned(),
                    (None, _) => return Err(wrong("an entity that is not defined")),
                }
            }
            Event::Comment(_) | Event::Decl(_) | Event::PI(_) => continue,
            Event::DocType(_) => return Err(wrong("a document type")),
            Event::Eof if open.is_empty() => return root.ok_or_else(|| wrong("nothing in it")),
            Event::Eof => return Err(wrong("it ends too early")),
        };
        match open.last_mut() {
            Some(element) => add_text(element, text),
            None if text.trim().is_empty() => {}
            None => return Err(wrong("text outside of all elements")),
        }
    }
}

/// References cut a text into several events.
fn add_text(element: &mut Element, text: String) {
    match element.children.last_mut() {
        Some(Node::Text(before)) => before.push_str(&text),
        _ => element.children.push(Node::Text(text)),
    }
}

fn element(tag: &BytesStart<'_>) -> Result<Element, String> {
    let mut element = Element::new(tag.name().as_ref());
    for attribute in tag.attributes() {
        let attribute = attribute.map_err(|error| error.to_string())?;
        let value = attribute.normalized_value(XmlVersion::Implicit1_0).map_err(|error| error.to_string())?;
        element.attributes.push((attribute.key.as_ref().to_owned(), value.into_owned()));
    }
    Ok(element)
}

fn close(mut element: Element, open: &mut [Element], root: &mut Option<Element>) {
    // Blanks between elements are indentation, which is made anew.
    if element.elements().next().is_some() {
        element.children.retain(|node| !matches!(node, Node::Text(text) if text.trim().is_empty()));
    }
    match open.last_mut() {
        Some(parent) => parent.children.push(Node::Element(element)),
        None => *root = Some(element),
    }
}

fn write(element: &Element, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    // Writing to a String cannot fail.
    let _ = write!(text, "{indent}<{}", element.name);
    for (name, value) in &element.attributes {
        let value = escape(value.as_str()).replace('\n', "&#10;").replace('\t', "&#9;").replace('\r', "&#13;");
        let _ = write!(text, " {name}='{value}'");
    }
    match element.children.as_slice() {
        [] => text.push_str("/>\n"),
        [Node::Text(only)] => {
            let _ = writeln!(text, ">{}</{}>", escape(only.as_str()), element.name);
        }
        children => {
            text.push_str(">\n");
            for child in children {
                match child {
                    Node::Element(child) => write(child, depth + 1, text),
                    Node::Text(words) => {
                        let _ = writeln!(text, "{indent}  {}", escape(words.trim()));
                    }
                }
            }
            let _ = writeln!(text, "{indent}</{}>", element.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_written_as_it_was_read() {
        let text = "<domain xmlns:qemu='http://q' type='kvm'>\n  <name>a&amp;b &lt;c&gt;</name>\n  <x y='&apos;&quot;&lt;'/>\n  \
                    <qemu:commandline>\n    <qemu:arg value='-s'/>\n  </qemu:commandline>\n</domain>\n";
        let domain = Element::parse(text, "domain").expect("it is well formed");
        assert_eq!(domain.child("name").map(Element::text).as_deref(), Some("a&b <c>"));
        assert_eq!(domain.child("x").and_then(|x| x.attribute("y")), Some("'\"<"));
        assert_eq!(domain.to_xml(), text);
        assert_eq!(Element::parse(&domain.to_xml(), "domain").as_ref(), Ok(&domain));
    }

    #[test]
    fn characters_come_back_whatever_way_they_were_written() {
        let text = "<?xml version='1.0'?><!-- c --><d a='x&#x41;&#10;y'>&#65;<![CDATA[<&]]>&amp;</d>";
        let read = Element::parse(text, "d").expect("it is well formed");
        assert_eq!((read.attribute("a"), read.text().as_str()), (Some("xA\ny"), "A<&&"));
        assert_eq!(Element::parse(&read.to_xml(), "d"), Ok(read));
    }

    #[test]
    fn what_is_no_usable_document_is_refused() {
        let deep = format!("{}{}", "<a>".repeat(100_000), "</a>".repeat(100_000));
        assert_eq!(Element::parse(&deep, "a"), Err(XmlError::TooDeep));
        assert_eq!(Element::parse(&" ".repeat(MAX_LENGTH + 1), "a"), Err(XmlError::TooLong));
        for text in [
            "",
            "x",
            "<a>",
            "</a>",
            "<a></b>",
            "<a/><a/>",
            "<a><b></a></b>",
            "<a b='1' b='2'/>",
            "<a b=1/>",
            "<a>&nope;</a>",
            "<a b='&nope;'/>",
            "<a>&#x110000;</a>",
            "<a/>text",
            "<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a>",
            "<a b='1",
            "<a><![CDATA[x</a>",
        ] {
            let refused = Element::parse(text, "a");
            assert!(matches!(refused, Err(XmlError::Syntax { .. })), "{text}: {refused:?}");
        }
        assert!(matches!(Element::parse("<network/>", "domain"), Err(XmlError::Root { .. })));
    }

    #[test]
    fn elements_are_found_changed_and_removed() {
        let mut a = Element::parse("<a><b n='1'/>text<b n='2'/><c><d>x</d></c></a>", "a").expect("it is well formed");
        assert_eq!(a.at(&["c", "d"]).map(Element::text).as_deref(), Some("x"));
        a.replace(Element::new("b").with("n", "3").holding(Element::new("e").saying("<")));
        assert_eq!(a.elements().filter(|element| element.name == "b").count(), 1);
        assert!(a.remove("c") && !a.remove("c"));
        assert_eq!(a.to_xml(), "<a>\n  text\n  <b n='3'>\n    <e>&lt;</e>\n  </b>\n</a>\n");
    }
}
