//! Reads the tar stream of a copy: the formats that [`crate::files`] writes, and an error for anything else.

use std::io::{self, Read};

use rustix::fs::FileType;

use crate::files::Remark;

/// Longest block of pax records: extended attributes make it long.
const RECORDS_MAX: u64 = 16 << 20;
/// Pieces of a sparse file.
const PIECES_MAX: usize = 1_000_000;
/// Content handed out at a time.
const PIECE: usize = 256 << 10;

/// What a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A file of this size, whose content is read next.
    File {
        /// In bytes.
        size: u64,
    },
    /// Another name of an earlier member.
    HardLink(Vec<u8>),
    /// A symbolic link.
    Symlink(Vec<u8>),
    /// A folder.
    Folder,
    /// A pipe or device.
    Special(FileType, (u32, u32)),
    /// No object, but something that is said of one.
    Remark(String),
}

/// An object of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub path: Vec<u8>,
    pub content: Content,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub atime: Option<(i64, u32)>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The stream.
pub struct Stream<R> {
    inner: R,
    /// Of the present file: pieces that wait (last first), and what fills its last block.
    pieces: Vec<(u64, u64)>,
    padding: u64,
    buffer: Vec<u8>,
}

/// Keys and values of the records before a member.
type Records = Vec<(Vec<u8>, Vec<u8>)>;

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the stream makes no sense: {what}"))
}

impl<R: Read> Stream<R> {
    pub fn new(inner: R) -> Stream<R> {
        Stream { inner, pieces: Vec::new(), padding: 0, buffer: vec![0; PIECE] }
    }

    /// The next member. What is left of the last one's content is passed over.
    pub fn next(&mut self) -> io::Result<Option<Member>> {
        while self.content()?.is_some() {}
        let mut records = Records::new();
        loop {
            let mut block = [0; 512];
            self.inner.read_exact(&mut block)?;
            if block == [0; 512] {
                return Ok(None);
            }
            let size = octal(&block[124..136])?;
            match block[156] {
                b'x' => records = self.records(size)?,
                b'g' => {
                    for (key, value) in self.records(size)? {
                        let text = String::from_utf8(value).map_err(|_| bad("a comment is not text"))?;
                        if key == b"comment"
                            && let Some(text) = text.strip_prefix(Remark::PREFIX)
                        {
                            return Ok(Some(remark(text)));
                        }
                    }
                }
                kind => return self.member(&block, kind, size, records).map(Some),
            }
        }
    }

    /// The next piece of the present file's content: offset and bytes.
    pub fn content(&mut self) -> io::Result<Option<(u64, &[u8])>> {
        let Some((offset, length)) = self.pieces.pop() else {
            let padding = std::mem::take(&mut self.padding);
            let rest = self.buffer.get_mut(..usize::try_from(padding).unwrap_or(0)).unwrap_or_default();
            self.inner.read_exact(rest)?;
            return Ok(None);
        };
        let step = usize::try_from(length).unwrap_or(PIECE).min(PIECE);
        let part = self.buffer.get_mut(..step).unwrap_or_default();
        self.inner.read_exact(part)?;
        if length > step as u64 {
            self.pieces.push((offset + step as u64, length - step as u64));
        }
        Ok(Some((offset, part)))
    }

    fn records(&mut self, size: u64) -> io::Result<Records> {
        if size > RECORDS_MAX {
            return Err(bad("a header is too long"));
        }
        let mut bytes = vec![0; usize::try_from(size.next_multiple_of(512)).unwrap_or(0)];
        self.inner.read_exact(&mut bytes)?;
        bytes.truncate(usize::try_from(size).unwrap_or(0));
        let mut rest = bytes.as_slice();
        let mut records = Records::new();
        while !rest.is_empty() {
            let space = rest.iter().position(|byte| *byte == b' ').ok_or_else(|| bad("a record has no length"))?;
            let length = number(rest.get(..space).unwrap_or_default())?;
            let length = usize::try_from(length).map_err(|_| bad("a record is too long"))?;
            let record = rest.get(space + 1..length).ok_or_else(|| bad("a record is cut off"))?;
            let record = record.strip_suffix(b"\n").ok_or_else(|| bad("a record is cut off"))?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(|| bad("a record has no value"))?;
            let (key, value) = record.split_at(equals);
            records.push((key.to_vec(), value.get(1..).unwrap_or_default().to_vec()));
            rest = rest.get(length..).unwrap_or_default();
        }
        Ok(records)
    }

    fn member(&mut self, block: &[u8; 512], kind: u8, size: u64, records: Records) -> io::Result<Member> {
        let record = |key: &[u8]| records.iter().find(|(found, _)| found == key).map(|(_, value)| value.as_slice());
        let amount = |key: &[u8], field: &[u8]| record(key).map_or_else(|| octal(field), number);
        let size = record(b"size").map_or(Ok(size), number)?;
        let text = |key: &[u8], field: &[u8]| record(key).map_or_else(|| until_zero(field), <[u8]>::to_vec);
        let mut path = text(b"path", &block[..100]);
        let device = (narrow(octal(&block[329..337])?)?, narrow(octal(&block[337..345])?)?);
        let content = match kind {
            b'0' => {
                let mut whole = size;
                self.padding = size.next_multiple_of(512) - size;
                if let Some(name) = record(b"GNU.sparse.name") {
                    path = name.to_vec();
                    whole =
                        record(b"GNU.sparse.realsize").map_or_else(|| Err(bad("a sparse file has no size")), number)?;
                    self.pieces = self.sparse_map(size, whole)?;
                    self.pieces.reverse();
                } else {
                    self.pieces = if size > 0 { vec![(0, size)] } else { Vec::new() };
                }
                Content::File { size: whole }
            }
            b'1' => Content::HardLink(text(b"linkpath", &block[157..257])),
            b'2' => Content::Symlink(text(b"linkpath", &block[157..257])),
            b'3' => Content::Special(FileType::CharacterDevice, device),
            b'4' => Content::Special(FileType::BlockDevice, device),
            b'5' => Content::Folder,
            b'6' => Content::Special(FileType::Fifo, device),
            _ => return Err(bad("a member is of an unknown kind")),
        };
        while path.len() > 1 && path.last() == Some(&b'/') {
            path.pop();
        }
        let xattrs = records
            .iter()
            .filter_map(|(key, value)| key.strip_prefix(b"SCHILY.xattr.").map(|name| (name.to_vec(), value.clone())));
        Ok(Member {
            path,
            content,
            mode: narrow(octal(&block[100..108])?)?,
            uid: narrow(amount(b"uid", &block[108..116])?)?,
            gid: narrow(amount(b"gid", &block[116..124])?)?,
            mtime: match record(b"mtime") {
                Some(text) => time(text)?,
                None => (i64::try_from(octal(&block[136..148])?).unwrap_or(0), 0),
            },
            atime: record(b"atime").map(time).transpose()?,
            xattrs: xattrs.collect(),
        })
    }

    /// The pieces of a sparse file; they and their map are `stored` bytes, and lie within `whole`.
    fn sparse_map(&mut self, stored: u64, whole: u64) -> io::Result<Vec<(u64, u64)>> {
        let mut numbers = Vec::new();
        let mut digits = Vec::new();
        let mut read = 0;
        let mut wanted = 1;
        while numbers.len() < wanted {
            let mut block = [0; 512];
            self.inner.read_exact(&mut block)?;
            read += 512;
            for byte in block {
                match byte {
                    b'\n' if numbers.len() < wanted => {
                        let found = number(&digits)?;
                        digits.clear();
                        if numbers.is_empty() {
                            let count = usize::try_from(found).ok().filter(|count| *count <= PIECES_MAX);
                            wanted = 1 + 2 * count.ok_or_else(|| bad("a sparse file has too many pieces"))?;
                        }
                        numbers.push(found);
                    }
                    b'0'..=b'9' if numbers.len() < wanted && digits.len() < 20 => digits.push(byte),
                    0 if numbers.len() >= wanted => {}
                    _ => return Err(bad("the map of a sparse file")),
                }
            }
        }
        let pieces: Vec<(u64, u64)> = numbers
            .get(1..)
            .unwrap_or_default()
            .chunks_exact(2)
            .filter_map(|pair| Some((*pair.first()?, *pair.last()?)))
            .collect();
        let (mut end, mut sum) = (0, 0);
        for (offset, length) in &pieces {
            if *offset < end {
                return Err(bad("the map of a sparse file"));
            }
            end = offset
                .checked_add(*length)
                .filter(|end| *end <= whole)
                .ok_or_else(|| bad("the map of a sparse file"))?;
            sum += length;
        }
        if read + sum != stored {
            return Err(bad("the map of a sparse file"));
        }
        Ok(pieces.into_iter().filter(|(_, length)| *length > 0).collect())
    }
}

fn remark(text: &str) -> Member {
    Member {
        path: Vec::new(),
        content: Content::Remark(text.to_owned()),
        mode: 0,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        atime: None,
        xattrs: Vec::new(),
    }
}

fn until_zero(field: &[u8]) -> Vec<u8> {
    field.iter().copied().take_while(|byte| *byte != 0).collect()
}

fn octal(field: &[u8]) -> io::Result<u64> {
    let text = until_zero(field);
    let text = std::str::from_utf8(&text).map_err(|_| bad("a number"))?.trim();
    if text.is_empty() {
        return Ok(0);
    }
    u64::from_str_radix(text, 8).map_err(|_| bad("a number"))
}

fn number(text: &[u8]) -> io::Result<u64> {
    std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).ok_or_else(|| bad("a number"))
}

fn narrow(number: u64) -> io::Result<u32> {
    u32::try_from(number).map_err(|_| bad("a number"))
}

/// Seconds with a fraction that may be negative, as seconds and the nanoseconds to add.
fn time(text: &[u8]) -> io::Result<(i64, u32)> {
    let text = std::str::from_utf8(text).map_err(|_| bad("a time"))?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let seconds: i64 = whole.parse().map_err(|_| bad("a time"))?;
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    let nanoseconds: u32 = digits.parse().map_err(|_| bad("a time"))?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Ok((seconds.saturating_sub(1), 1_000_000_000 - nanoseconds));
    }
    Ok((seconds, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_they_are_written() {
        assert_eq!(time(b"7.000000005").unwrap(), (7, 5));
        assert_eq!(time(b"-1.750000000").unwrap(), (-2, 250_000_000));
        assert_eq!(time(b"-2").unwrap(), (-2, 0));
    }

    #[test]
    fn streams_that_are_cut_or_changed_are_errors_and_nothing_worse() {
        let mut block = [0_u8; 512];
        block[..4].copy_from_slice(b"file");
        block[124..135].copy_from_slice(b"00000001000");
        block[156] = b'0';
        let whole = [block.as_slice(), &[7; 512], &[0; 1024]].concat();
        for cut in 0..whole.len() {
            let mut stream = Stream::new(&whole[..cut]);
            while let Ok(Some(_)) = stream.next() {}
        }
        for at in 0..512 {
            for value in [0, 1, b'7', 255] {
                let mut changed = whole.clone();
                changed[at] = value;
                let mut stream = Stream::new(changed.as_slice());
                while let Ok(Some(_)) = stream.next() {}
            }
        }
    }
}
