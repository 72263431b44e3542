//! Writes tar streams: POSIX.1-2001 ("pax"), with holes as GNU tar's sparse format 1.0 and extended attributes as
//! `SCHILY.xattr.`, which GNU tar and bsdtar both read.

use images::fs::{Node, Timestamp};

/// Everything in a tar stream is a multiple of this.
pub const BLOCK: u64 = 512;
/// Names from this length on need a pax record.
const NAME_MAX: usize = 100;

/// The kinds of entries that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry<'a> {
    /// A regular file with its content of this many bytes in the stream.
    File(u64),
    /// The same with holes: of the content, `stored` bytes are in the stream.
    Sparse {
        /// Bytes in the stream, with the map of holes.
        stored: u64,
        /// Bytes of the file.
        size: u64,
    },
    /// Another name of an earlier file.
    HardLink(&'a [u8]),
    /// A symbolic link.
    Symlink(&'a [u8]),
    /// A directory.
    Directory,
    /// A pipe.
    Fifo,
    /// A character device.
    CharDevice(u32, u32),
    /// A block device.
    BlockDevice(u32, u32),
}

/// The header of an entry, pax records first.
pub fn header(path: &[u8], entry: Entry<'_>, node: &Node, xattrs: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let (kind, size, link) = match entry {
        Entry::File(size) | Entry::Sparse { stored: size, .. } => (b'0', size, &b""[..]),
        Entry::HardLink(target) => (b'1', 0, target),
        Entry::Symlink(target) => (b'2', 0, target),
        Entry::CharDevice(..) => (b'3', 0, &b""[..]),
        Entry::BlockDevice(..) => (b'4', 0, &b""[..]),
        Entry::Directory => (b'5', 0, &b""[..]),
        Entry::Fifo => (b'6', 0, &b""[..]),
    };
    let mut records = Vec::new();
    let mut name = path.to_vec();
    if let Entry::Sparse { size, .. } = entry {
        record(&mut records, b"GNU.sparse.major", b"1");
        record(&mut records, b"GNU.sparse.minor", b"0");
        record(&mut records, b"GNU.sparse.name", path);
        record(&mut records, b"GNU.sparse.realsize", size.to_string().as_bytes());
        name = b"sparse".to_vec();
    }
    if matches!(entry, Entry::Directory) {
        name.push(b'/');
    }
    if name.len() > NAME_MAX || !name.is_ascii() {
        record(&mut records, b"path", &name);
    }
    if link.len() > NAME_MAX || !link.is_ascii() {
        record(&mut records, b"linkpath", link);
    }
    if node.modified.nanoseconds != 0 || !(0..=0o777_7777_7777).contains(&node.modified.seconds) {
        record(&mut records, b"mtime", time(node.modified).as_bytes());
    }
    if node.accessed != Timestamp::default() {
        record(&mut records, b"atime", time(node.accessed).as_bytes());
    }
    let fits = |number: u64, digits: u32| number < 1 << (3 * digits);
    for (key, number, digits) in [("size", size, 11), ("uid", node.uid.into(), 7), ("gid", node.gid.into(), 7)] {
        if !fits(number, digits) {
            record(&mut records, key.as_bytes(), number.to_string().as_bytes());
        }
    }
    for (name, value) in xattrs {
        // An equals sign would end the keyword.
        if !name.contains(&b'=') {
            record(&mut records, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
        }
    }
    let mut out = Vec::new();
    if !records.is_empty() {
        pax(b'x', &records, &mut out);
    }
    let device = match entry {
        Entry::CharDevice(major, minor) | Entry::BlockDevice(major, minor) => (major, minor),
        _ => (0, 0),
    };
    let seconds = u64::try_from(node.modified.seconds).unwrap_or(0);
    out.extend_from_slice(&ustar(&name, kind, size, link, &Fields { node, seconds, device }));
    out
}

/// A global header whose only record is a comment; other readers pass it over.
pub fn comment(text: &str) -> Vec<u8> {
    let mut records = Vec::new();
    record(&mut records, b"comment", text.as_bytes());
    let mut out = Vec::new();
    pax(b'g', &records, &mut out);
    out
}

/// The map of a sparse file that comes before its data: a count, then offset and length of each piece.
pub fn sparse_map(pieces: &[(u64, u64)]) -> Vec<u8> {
    let mut map = format!("{}\n", pieces.len()).into_bytes();
    for (offset, length) in pieces {
        map.extend_from_slice(format!("{offset}\n{length}\n").as_bytes());
    }
    pad(&mut map);
    map
}

/// Fills up with zeroes to a whole block.
pub fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(512), 0);
}

/// The stream's end.
pub fn end() -> Vec<u8> {
    vec![0; 1024]
}

fn time(time: Timestamp) -> String {
    // The fraction counts upwards from the whole seconds, which may be negative.
    if time.seconds < 0 && time.nanoseconds != 0 {
        return format!("-{}.{:09}", -(time.seconds + 1), 1_000_000_000 - time.nanoseconds);
    }
    format!("{}.{:09}", time.seconds, time.nanoseconds)
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
fn record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(format!("{length} ").as_bytes());
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

fn pax(kind: u8, records: &[u8], out: &mut Vec<u8>) {
    let node = Node {
        id: images::fs::NodeId(0),
        kind: images::fs::FileType::File,
        mode: 0o644,
        uid: 0,
        gid: 0,
        size: 0,
        links: 1,
        modified: Timestamp::default(),
        accessed: Timestamp::default(),
        changed: Timestamp::default(),
        device: (0, 0),
    };
    let fields = Fields { node: &node, seconds: 0, device: (0, 0) };
    out.extend_from_slice(&ustar(b"pax", kind, records.len() as u64, b"", &fields));
    out.extend_from_slice(records);
    pad(out);
}

struct Fields<'a> {
    node: &'a Node,
    seconds: u64,
    device: (u32, u32),
}

fn ustar(name: &[u8], kind: u8, size: u64, link: &[u8], fields: &Fields<'_>) -> [u8; 512] {
    let mut block = [0; 512];
    let mut text = |at: usize, length: usize, value: &[u8]| {
        for (to, from) in block.iter_mut().skip(at).take(length).zip(value) {
            *to = *from;
        }
    };
    let octal = |number: u64, digits: usize| {
        let number = if number < 1 << (3 * digits) { number } else { 0 };
        format!("{number:0digits$o}\0").into_bytes()
    };
    text(0, 100, name);
    text(100, 8, &octal(fields.node.mode.into(), 7));
    text(108, 8, &octal(fields.node.uid.into(), 7));
    text(116, 8, &octal(fields.node.gid.into(), 7));
    text(124, 12, &octal(size, 11));
    text(136, 12, &octal(fields.seconds, 11));
    text(148, 8, b"        ");
    text(156, 1, &[kind]);
    text(157, 100, link);
    text(257, 8, b"ustar\x0000");
    text(329, 8, &octal(fields.device.0.into(), 7));
    text(337, 8, &octal(fields.device.1.into(), 7));
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    for (to, from) in block.iter_mut().skip(148).zip(format!("{sum:06o}\0 ").bytes()) {
        *to = from;
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_count_themselves() {
        for (length, whole) in [(1, "8 a=x\n".len()), (5, "12 a=xxxxx\n".len())] {
            let mut out = Vec::new();
            record(&mut out, b"a", &vec![b'x'; length]);
            assert!(out.starts_with(format!("{} ", out.len()).as_bytes()), "{out:?}");
            assert!(out.len().abs_diff(whole) <= 2);
        }
        for length in 0..2000 {
            let mut out = Vec::new();
            record(&mut out, b"key", &vec![b'v'; length]);
            assert!(out.starts_with(format!("{} key=", out.len()).as_bytes()), "{length}");
        }
    }

    #[test]
    fn times_before_1970_count_backwards() {
        assert_eq!(time(Timestamp { seconds: 7, nanoseconds: 5 }), "7.000000005");
        assert_eq!(time(Timestamp { seconds: -2, nanoseconds: 250_000_000 }), "-1.750000000");
        assert_eq!(time(Timestamp { seconds: -2, nanoseconds: 0 }), "-2.000000000");
    }
}
