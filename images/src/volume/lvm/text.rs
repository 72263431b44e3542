//! LVM2's text format: `name { key = value }`, with numbers, strings and lists, and comments from `#` to the line's end.

/// Sections in sections; LVM itself has four.
const DEPTH_MAX: usize = 16;

/// A section.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Section {
    pub name: String,
    pub values: Vec<(String, Value)>,
    pub sections: Vec<Section>,
}

/// What a key is set to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Number(u64),
    Text(String),
    List(Vec<Value>),
}

impl Section {
    fn value(&self, key: &str) -> Option<&Value> {
        self.values.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    pub(super) fn number(&self, key: &str) -> Option<u64> {
        match self.value(key)? {
            Value::Number(number) => Some(*number),
            _ => None,
        }
    }

    pub(super) fn text(&self, key: &str) -> Option<&str> {
        match self.value(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn values_of(&self, key: &str) -> &[Value] {
        match self.value(key) {
            Some(Value::List(values)) => values,
            _ => &[],
        }
    }

    /// A list of strings; a single string is a list of one.
    pub(super) fn list(&self, key: &str) -> Vec<String> {
        let texts = |value: &Value| match value {
            Value::Text(text) => Some(text.clone()),
            _ => None,
        };
        match self.value(key) {
            Some(Value::List(values)) => values.iter().filter_map(texts).collect(),
            Some(value) => texts(value).into_iter().collect(),
            None => Vec::new(),
        }
    }

    pub(super) fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }
}

/// The whole text as a section without a name.
pub(super) fn parse(text: &str) -> Result<Section, &'static str> {
    let mut rest = text;
    let mut open: Vec<Section> = vec![Section::default()];
    while let Some(word) = token(&mut rest)? {
        match word {
            Token::Close => {
                let done = open.pop().filter(|_| !open.is_empty()).ok_or("it closes a section that is not open")?;
                open.last_mut().ok_or("it closes a section that is not open")?.sections.push(done);
            }
            Token::Word(name) => match token(&mut rest)? {
                Some(Token::Open) if open.len() <= DEPTH_MAX => {
                    open.push(Section { name: name.to_owned(), ..Section::default() });
                }
                Some(Token::Equals) => {
                    let value = value(&mut rest)?;
                    open.last_mut().ok_or("it ends early")?.values.push((name.to_owned(), value));
                }
                _ => return Err("a name is followed by neither a value nor a section"),
            },
            _ => return Err("it has a sign where a name should be"),
        }
    }
    if open.len() != 1 {
        return Err("it ends within a section");
    }
    open.pop().ok_or("it is empty")
}

enum Token<'a> {
    Open,
    Close,
    ListOpen,
    ListClose,
    Equals,
    Comma,
    Text(String),
    Word(&'a str),
}

fn token<'a>(rest: &mut &'a str) -> Result<Option<Token<'a>>, &'static str> {
    loop {
        *rest = rest.trim_start();
        match rest.strip_prefix('#') {
            Some(comment) => *rest = comment.split_once('\n').map_or("", |(_, next)| next),
            None => break,
        }
    }
    let mut letters = rest.chars();
    let Some(first) = letters.next() else { return Ok(None) };
    let sign = match first {
        '{' => Token::Open,
        '}' => Token::Close,
        '[' => Token::ListOpen,
        ']' => Token::ListClose,
        '=' => Token::Equals,
        ',' => Token::Comma,
        '"' => {
            let mut text = String::new();
            loop {
                match letters.next().ok_or("it ends within a string")? {
                    '"' => break,
                    '\\' => text.push(letters.next().ok_or("it ends within a string")?),
                    letter => text.push(letter),
                }
            }
            *rest = letters.as_str();
            return Ok(Some(Token::Text(text)));
        }
        _ => {
            let end = rest.find(|c: char| c.is_whitespace() || "{}[]=,\"#".contains(c)).unwrap_or(rest.len());
            let (word, next) = rest.split_at(end);
            *rest = next;
            return Ok(Some(Token::Word(word)));
        }
    };
    *rest = letters.as_str();
    Ok(Some(sign))
}

fn value(rest: &mut &str) -> Result<Value, &'static str> {
    const BAD: &str = "a value makes no sense";
    match token(rest)?.ok_or(BAD)? {
        Token::ListOpen => {
            let mut values = Vec::new();
            loop {
                match token(rest)?.ok_or(BAD)? {
                    Token::ListClose => return Ok(Value::List(values)),
                    Token::Comma => {}
                    other => values.push(scalar(other).ok_or(BAD)?),
                }
            }
        }
        other => scalar(other).ok_or(BAD),
    }
}

fn scalar(token: Token<'_>) -> Option<Value> {
    match token {
        Token::Text(text) => Some(Value::Text(text)),
        // Negative numbers and fractions stand nowhere that is read here.
        Token::Word(word) => Some(word.parse().map_or_else(|_| Value::Text(word.to_owned()), Value::Number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_is_taken_apart() {
        let text = "vg {\n id = \"a-b\" # the id\n seqno = 7\n flags = []\n lv { status = [\"READ\", \"VISIBLE\"]\n stripes = [\n\"pv0\", 12\n]\n}\n}\n# end\nversion = 1\n";
        let root = parse(text).unwrap();
        let group = root.section("vg").unwrap();
        assert_eq!(group.text("id"), Some("a-b"));
        assert_eq!(group.number("seqno"), Some(7));
        let volume = group.section("lv").unwrap();
        assert_eq!(volume.list("status"), ["READ", "VISIBLE"]);
        assert_eq!(volume.values_of("stripes"), [Value::Text("pv0".into()), Value::Number(12)]);
        assert_eq!(root.number("version"), Some(1));
    }

    #[test]
    fn text_that_is_cut_or_nested_without_end_is_refused() {
        let whole = "vg { id = \"x\" list = [ 1, 2 ] lv { a = 1 } }";
        for cut in 1..whole.len() {
            assert!(parse(&whole[..cut]).is_err(), "{}", &whole[..cut]);
        }
        assert!(parse(&"a {".repeat(100_000)).is_err());
        assert!(parse("}").is_err());
        assert!(parse("a = = 1").is_err());
    }
}
