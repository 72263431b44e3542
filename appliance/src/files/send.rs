//! Copies files and trees into a tar stream.
//!
//! What cannot be read does not end the stream: it is told as a comment, which our own reader reports and other readers
//! pass over. The last comment says that the stream is whole.

use std::collections::HashMap;

use bytes::Bytes;
use images::DiskImage;
use images::fs::{FileSystem, FileType, FsError, Located, Node, NodeId, Walk, WalkStep, find_path};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::list::from_fs;
use super::place::{self, Within};
use super::source::Disks;
use super::tar::{self, Entry};
use crate::problem::{Problem, chain};

/// Bytes read and sent at a time.
const PIECE: usize = 512 << 10;
/// Pieces of a sparse file that are told apart; of one with more, the rest is taken as data.
const PIECES_MAX: usize = 200_000;
/// Smallest hole that is worth telling.
const HOLE_MIN: u64 = 4096;
/// Files with several names that are remembered; names of others become copies.
const LINKED_MAX: usize = 1_000_000;
/// Longest name that Linux takes.
const NAME_MAX: usize = 255;
/// Objects that a glob may find.
const GLOB_MAX: usize = 100_000;

/// What is told beside the files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Remark {
    /// An object is missing from the stream, or what came last is not as it was.
    Problem {
        /// The object.
        path: String,
        /// Why.
        text: String,
        /// The entry before this is cut off.
        #[serde(default)]
        cut: bool,
    },
    /// Something to know.
    Notice(String),
    /// The stream is whole.
    End,
}

impl Remark {
    /// What a comment begins with that is a remark.
    pub const PREFIX: &'static str = "lifeboat ";

    fn encode(&self) -> Vec<u8> {
        tar::comment(&format!("{}{}", Remark::PREFIX, serde_json::to_string(self).unwrap_or_default()))
    }
}

/// Nobody listens any more.
#[derive(Debug)]
pub struct Gone;

/// Takes the stream. It returns false when nobody listens any more.
pub type Sink<'a> = &'a mut dyn FnMut(Bytes) -> bool;

/// One place whose files are copied, found before the stream begins.
pub struct Found {
    fs: usize,
    top: Vec<u8>,
    path: Vec<Vec<u8>>,
    node: Node,
}

/// Everything that is to be copied.
pub struct Copy {
    opened: Vec<place::Opened>,
    found: Vec<Found>,
    notices: Vec<String>,
}

impl Copy {
    /// Finds what the places name. A place that names nothing is a problem, and nothing is sent then.
    pub fn find(places: &[(std::sync::Arc<Disks>, Within)]) -> Result<Copy, Problem> {
        let mut copy = Copy { opened: Vec::new(), found: Vec::new(), notices: Vec::new() };
        for (disks, within) in places {
            let opened = place::open(disks, within)?;
            let path = within.path.as_deref().unwrap_or("/");
            let found = expand(opened.fs.as_ref(), path)
                .map_err(|error| from_fs(&format!("{}:{}", opened.disk, opened.volume), &error))?;
            if found.is_empty() {
                return Err(Problem::not_found(format!("nothing matches {path} in {}:{}", opened.disk, opened.volume)));
            }
            let at = copy.opened.len();
            copy.notices.extend(disks.notice.clone().into_iter().chain(opened.fs.notices()));
            copy.opened.push(opened);
            for (path, node) in found {
                let top = path.last().cloned().unwrap_or_else(|| b".".to_vec());
                copy.found.push(Found { fs: at, top, path, node });
            }
        }
        copy.notices.dedup();
        Ok(copy)
    }
}

/// Sends it all.
pub fn send(copy: &Copy, sink: Sink<'_>) -> Result<(), Gone> {
    let mut sender = Sender { sink, buffer: Vec::with_capacity(PIECE), linked: HashMap::new() };
    for notice in &copy.notices {
        sender.remark(&Remark::Notice(notice.clone()))?;
    }
    for found in &copy.found {
        if let Some(opened) = copy.opened.get(found.fs) {
            sender.tree(opened.fs.as_ref(), found)?;
        }
        sender.linked.clear();
    }
    sender.remark(&Remark::End)?;
    sender.write(&tar::end())?;
    sender.flush()
}

/// The objects that a path with globs in it names.
fn expand(fs: &dyn FileSystem, path: &str) -> Result<Vec<Located>, FsError> {
    let is_glob = |name: &str| name.contains(['*', '?', '[', '{']);
    // A name that looks like a glob may be there as it is.
    match find_path(fs, path.as_bytes()) {
        Err(FsError::NotFound { .. }) if is_glob(path) => {}
        found => return found.map(|found| vec![found]),
    }
    let names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
    let mut found = vec![(Vec::new(), fs.node(fs.root())?)];
    for name in names {
        let mut next = Vec::new();
        let matcher = super::find::matcher(name, fs.ignores_case());
        for (path, node) in found {
            if !is_glob(name) {
                let path: Vec<Vec<u8>> = [path, vec![name.as_bytes().to_vec()]].concat();
                match find_path(fs, &path.join(&b'/')) {
                    Ok(found) => next.push(found),
                    Err(FsError::NotFound { .. } | FsError::NotADirectory { .. }) => {}
                    Err(error) => return Err(error),
                }
                continue;
            }
            let node = if node.kind == FileType::Symlink {
                match find_path(fs, &[path.join(&b'/'), b"/.".to_vec()].concat()) {
                    Ok((_, node)) => node,
                    Err(_) => continue,
                }
            } else {
                node
            };
            if node.kind != FileType::Directory {
                continue;
            }
            let mut cursor = 0;
            loop {
                let entries = fs.read_dir(node.id, cursor)?;
                match entries.last() {
                    Some(last) if last.next > cursor => cursor = last.next,
                    _ => break,
                }
                for entry in entries {
                    let hidden = entry.name.starts_with(b".") && !name.starts_with('.');
                    if next.len() < GLOB_MAX
                        && !hidden
                        && matcher.as_ref().is_some_and(|matcher| matcher.matches(&entry.name))
                    {
                        next.push(([path.as_slice(), &[entry.name]].concat(), fs.node(entry.id)?));
                    }
                }
            }
        }
        found = next;
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

struct Sender<'a> {
    sink: Sink<'a>,
    buffer: Vec<u8>,
    linked: HashMap<NodeId, Vec<u8>>,
}

impl Sender<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= PIECE { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Gone> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let full = std::mem::replace(&mut self.buffer, Vec::with_capacity(PIECE));
        if (self.sink)(full.into()) { Ok(()) } else { Err(Gone) }
    }

    fn remark(&mut self, remark: &Remark) -> Result<(), Gone> {
        self.write(&remark.encode())
    }

    fn problem(&mut self, path: &[u8], text: String, cut: bool) -> Result<(), Gone> {
        self.remark(&Remark::Problem { path: String::from_utf8_lossy(path).into_owned(), text, cut })
    }

    fn tree(&mut self, fs: &dyn FileSystem, found: &Found) -> Result<(), Gone> {
        for step in Walk::new(fs, found.node.clone()) {
            let (below, outcome) = match step {
                WalkStep::Node(below, node) => (below, Ok(node)),
                WalkStep::Problem(below, error) => (below, Err(error)),
            };
            let whole = [found.path.as_slice(), &below].concat();
            match outcome {
                Err(error) => self.problem(super::answer::show(&whole).as_bytes(), chain(&error), false)?,
                Ok(node) => {
                    let mut path = if found.path.is_empty() { b".".to_vec() } else { safe_name(&found.top) };
                    for name in &below {
                        path.push(b'/');
                        path.extend_from_slice(&safe_name(name));
                    }
                    if whole.last().is_some_and(|name| safe_name(name) != *name) {
                        let text =
                            format!("{} is written as {}", super::answer::show(&whole), String::from_utf8_lossy(&path));
                        self.remark(&Remark::Notice(text))?;
                    }
                    self.node(fs, &path, &node)?;
                }
            }
        }
        Ok(())
    }

    fn node(&mut self, fs: &dyn FileSystem, path: &[u8], node: &Node) -> Result<(), Gone> {
        if node.kind != FileType::Directory
            && node.links > 1
            && let Some(first) = self.linked.get(&node.id)
        {
            let header = tar::header(path, Entry::HardLink(first), node, &[]);
            return self.write(&header);
        }
        let xattrs = match fs.xattrs(node.id) {
            Ok(xattrs) => xattrs,
            Err(error) => {
                self.problem(path, format!("its extended attributes are left out: {}", chain(&error)), false)?;
                Vec::new()
            }
        };
        let (major, minor) = node.device;
        let entry = match node.kind {
            FileType::File => {
                self.file(fs, path, node, &xattrs)?;
                return self.streams(fs, path, node);
            }
            FileType::Directory => Entry::Directory,
            FileType::Fifo => Entry::Fifo,
            FileType::CharDevice => Entry::CharDevice(major, minor),
            FileType::BlockDevice => Entry::BlockDevice(major, minor),
            FileType::Socket => {
                return self
                    .remark(&Remark::Notice(format!("{} is a socket and left out", String::from_utf8_lossy(path))));
            }
            FileType::Symlink => match fs.read_link(node.id) {
                Ok(target) => {
                    self.remember(path, node);
                    return self.write(&tar::header(path, Entry::Symlink(&target), node, &xattrs));
                }
                Err(error) => return self.problem(path, chain(&error), false),
            },
        };
        self.remember(path, node);
        self.write(&tar::header(path, entry, node, &xattrs))?;
        if node.kind == FileType::Directory { self.streams(fs, path, node) } else { Ok(()) }
    }

    fn remember(&mut self, path: &[u8], node: &Node) {
        if node.kind != FileType::Directory && node.links > 1 && self.linked.len() < LINKED_MAX {
            self.linked.insert(node.id, path.to_vec());
        }
    }

    fn file(
        &mut self,
        fs: &dyn FileSystem,
        path: &[u8],
        node: &Node,
        xattrs: &[(Vec<u8>, Vec<u8>)],
    ) -> Result<(), Gone> {
        match fs.open(node.id) {
            Ok(content) => {
                self.remember(path, node);
                self.content(content.as_ref(), path, node, xattrs)
            }
            Err(error) => self.problem(path, chain(&error), false),
        }
    }

    /// Streams that are too long to be extended attributes become files of their own, beside the object's.
    fn streams(&mut self, fs: &dyn FileSystem, path: &[u8], node: &Node) -> Result<(), Gone> {
        let streams = match fs.streams(node.id) {
            Ok(streams) => streams,
            Err(error) => {
                return self.problem(path, format!("its streams are left out: {}", chain(&error)), false);
            }
        };
        for (name, content) in streams {
            let above = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
            let (folder, own) = path.split_at(above);
            let beside = [folder, &safe_name(&[own, b":", &name].concat())].concat();
            let (object, beside_shown) = (String::from_utf8_lossy(path), String::from_utf8_lossy(&beside));
            let text = format!("a stream of {object} is written as {beside_shown}");
            self.remark(&Remark::Notice(text))?;
            self.content(content.as_ref(), &beside, &Node { kind: FileType::File, ..node.clone() }, &[])?;
        }
        Ok(())
    }

    fn content(
        &mut self,
        content: &dyn DiskImage,
        path: &[u8],
        node: &Node,
        xattrs: &[(Vec<u8>, Vec<u8>)],
    ) -> Result<(), Gone> {
        let pieces = match pieces(content) {
            Ok(pieces) => pieces,
            Err(source) => {
                let error = FsError::Io { object: "its extents".to_owned(), source };
                return self.problem(path, chain(&error), false);
            }
        };
        let size = content.size();
        let whole = pieces.iter().map(|(_, length)| length).sum::<u64>() == size;
        let mut length = size;
        if whole {
            self.write(&tar::header(path, Entry::File(size), node, xattrs))?;
        } else {
            let map = tar::sparse_map(&pieces);
            length = pieces.iter().map(|(_, length)| length).sum::<u64>();
            let stored = map.len() as u64 + length;
            self.write(&tar::header(path, Entry::Sparse { stored, size }, node, xattrs))?;
            self.write(&map)?;
        }
        let mut failure = None;
        for (offset, length) in pieces {
            self.piece(content, offset, length, &mut failure)?;
        }
        let rest = length.next_multiple_of(tar::BLOCK) - length;
        self.write(&vec![0; usize::try_from(rest).unwrap_or(0)])?;
        match failure {
            Some(error) => self.problem(path, error, true),
            None => Ok(()),
        }
    }

    /// Sends a piece of a file's content. What cannot be read is sent as zeroes, since its length has been told.
    fn piece(
        &mut self,
        content: &dyn DiskImage,
        offset: u64,
        length: u64,
        failure: &mut Option<String>,
    ) -> Result<(), Gone> {
        let mut at = 0;
        while at < length {
            let step = usize::try_from(length - at).unwrap_or(PIECE).min(PIECE);
            let begin = self.buffer.len();
            self.buffer.resize(begin + step, 0);
            let part = self.buffer.get_mut(begin..).unwrap_or_default();
            if failure.is_none()
                && let Err(error) = content.read_at(offset + at, part)
            {
                part.fill(0);
                *failure = Some(chain(&error));
            }
            at += step as u64;
            if self.buffer.len() >= PIECE {
                self.flush()?;
            }
        }
        Ok(())
    }
}

/// Offset and length of the pieces with data; for a file without holes worth telling, one of all of it.
fn pieces(content: &dyn DiskImage) -> std::io::Result<Vec<(u64, u64)>> {
    let size = content.size();
    let mut pieces: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while at < size {
        if pieces.len() >= PIECES_MAX {
            pieces.push((at, size - at));
            break;
        }
        let Some(data) = content.next_data(at)? else { break };
        let (start, end) = (data.start.clamp(at, size), data.end.min(size));
        if end <= start {
            break;
        }
        match pieces.last_mut() {
            Some((begin, length)) if start < *begin + *length + HOLE_MIN => *length = end - *begin,
            None if start < HOLE_MIN => pieces.push((0, end)),
            _ => pieces.push((start, end - start)),
        }
        at = end;
    }
    match pieces.last_mut() {
        Some((begin, length)) if size - (*begin + *length) < HOLE_MIN => *length = size - *begin,
        None if size < HOLE_MIN && size > 0 => pieces.push((0, size)),
        // An empty piece at the end is how tar tells that a file ends in a hole.
        Some((begin, length)) if *begin + *length < size => pieces.push((size, 0)),
        None if size > 0 => pieces.push((size, 0)),
        _ => {}
    }
    Ok(pieces)
}

/// A name that Linux takes, as like the given one as can be.
fn safe_name(name: &[u8]) -> Vec<u8> {
    if matches!(name, b"" | b"." | b"..") {
        return [b"_", name].concat();
    }
    let mut safe: Vec<u8> = name.iter().map(|byte| if matches!(byte, 0 | b'/') { b'_' } else { *byte }).collect();
    if safe.len() > NAME_MAX {
        let sum = format!("~{:08x}", crc32c::crc32c(name));
        let mut end = NAME_MAX - sum.len();
        // Not within a letter.
        while end > 0 && safe.get(end).is_some_and(|byte| byte & 0xc0 == 0x80) {
            end -= 1;
        }
        safe.truncate(end);
        safe.extend_from_slice(sum.as_bytes());
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_ones_that_can_be_made() {
        assert_eq!(safe_name(b"plain \xff"), b"plain \xff");
        assert_eq!(safe_name(b".."), b"_..");
        assert_eq!(safe_name(b"../../etc/passwd"), b".._.._etc_passwd");
        assert_eq!(safe_name(b""), b"_");
        let long = safe_name("\u{65e5}".repeat(200).as_bytes());
        assert!(long.len() <= 255 && std::str::from_utf8(&long).is_ok(), "{long:?}");
        assert_ne!(long, safe_name("\u{65e5}".repeat(201).as_bytes()));
    }
}
