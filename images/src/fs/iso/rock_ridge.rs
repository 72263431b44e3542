//! The entries of SUSP and Rock Ridge behind a directory record.

use super::{Iso, continuation, long_time};
use crate::bytes::{le, part, u8};
use crate::fs::time::civil;
use crate::fs::{FsError, Timestamp};

/// Continuations followed; each is a sector at most.
const CONTINUATIONS_MAX: usize = 32;
/// Longest name or target.
const TEXT_MAX: usize = 4096;

/// All entries of a record, by signature.
pub(super) struct Entries(Vec<([u8; 2], Vec<u8>)>);

/// What Unix knows of a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unix {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// Times, as far as they are told.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Times {
    pub modified: Option<Timestamp>,
    pub accessed: Option<Timestamp>,
    pub changed: Option<Timestamp>,
}

impl Entries {
    pub(super) fn read(fs: &Iso, bytes: &[u8]) -> Result<Entries, FsError> {
        let mut found = Vec::new();
        let mut area = bytes.to_vec();
        for _ in 0..CONTINUATIONS_MAX {
            let mut next = None;
            let mut at = 0;
            while at + 4 <= area.len() {
                let length = usize::from(u8(&area, at + 2));
                let entry = part(&area, at, length);
                if length < 4 || entry.len() != length {
                    break;
                }
                match part(entry, 0, 2) {
                    b"CE" => next = Some((le::u32(entry, 4), le::u32(entry, 12), le::u32(entry, 20))),
                    b"ST" => break,
                    signature => found.push(([u8(signature, 0), u8(signature, 1)], entry.to_vec())),
                }
                at += length;
            }
            match next {
                Some((block, offset, length)) => area = continuation(fs, block, offset, length)?,
                None => break,
            }
        }
        Ok(Entries(found))
    }

    fn all(&self, signature: [u8; 2]) -> impl Iterator<Item = &[u8]> {
        self.0.iter().filter(move |(found, _)| *found == signature).map(|(_, entry)| entry.as_slice())
    }

    fn first(&self, signature: &[u8; 2]) -> Option<&[u8]> {
        self.all(*signature).next()
    }

    /// Whether these are the entries of a root with Rock Ridge.
    pub(super) fn has_rock_ridge(&self) -> bool {
        let named = |entry: &[u8]| {
            let name = part(entry, 8, u8(entry, 4).into());
            matches!(name, b"RRIP_1991A" | b"IEEE_P1282" | b"IEEE_1282")
        };
        self.first(b"SP").is_some_and(|entry| part(entry, 4, 2) == [0xbe, 0xef])
            && (self.all(*b"ER").any(named) || self.first(b"RR").is_some() || self.first(b"PX").is_some())
    }

    /// Bytes before the entries of every other record.
    pub(super) fn skip(&self) -> usize {
        self.first(b"SP").map_or(0, |entry| u8(entry, 6).into())
    }

    /// The name, whose parts may be in several entries.
    pub(super) fn name(&self) -> Option<Vec<u8>> {
        const CURRENT_OR_PARENT: u8 = 0x06;
        let mut name = Vec::new();
        for entry in self.all(*b"NM").filter(|entry| u8(entry, 4) & CURRENT_OR_PARENT == 0) {
            name.extend_from_slice(part(entry, 5, entry.len()));
        }
        name.truncate(TEXT_MAX);
        (!name.is_empty()).then_some(name)
    }

    pub(super) fn unix(&self) -> Option<Unix> {
        let entry = self.first(b"PX").filter(|entry| entry.len() >= 36)?;
        Some(Unix { mode: le::u32(entry, 4), uid: le::u32(entry, 20), gid: le::u32(entry, 28) })
    }

    pub(super) fn device(&self) -> Option<(u32, u32)> {
        let entry = self.first(b"PN").filter(|entry| entry.len() >= 20)?;
        // Either half may have both numbers.
        let (high, low) = (le::u32(entry, 4), le::u32(entry, 12));
        Some(if high == 0 { (low >> 8, low & 0xff) } else { (high, low) })
    }

    /// Times in the order of their bits; short ones have seven bytes, long ones seventeen.
    pub(super) fn times(&self) -> Times {
        let mut times = Times::default();
        for entry in self.all(*b"TF") {
            let flags = u8(entry, 4);
            let length = if flags & 0x80 != 0 { 17 } else { 7 };
            let mut at = 5;
            for bit in 0..7 {
                if flags & 1 << bit == 0 {
                    continue;
                }
                let bytes = part(entry, at, length);
                at += length;
                if bytes.len() != length {
                    break;
                }
                let time = if length == 17 { long_time(bytes) } else { Some(short_time(bytes)) };
                match bit {
                    1 => times.modified = time,
                    2 => times.accessed = time,
                    3 => times.changed = time,
                    _ => {}
                }
            }
        }
        times
    }

    /// The target of a symbolic link, put together from its components.
    pub(super) fn link(&self) -> Option<Vec<u8>> {
        let mut target: Vec<u8> = Vec::new();
        let mut joined = true;
        let mut any = false;
        for entry in self.all(*b"SL") {
            any = true;
            let mut at = 5;
            while at + 2 <= entry.len() && target.len() < TEXT_MAX {
                let (flags, text) = (u8(entry, at), part(entry, at + 2, u8(entry, at + 1).into()));
                at += 2 + usize::from(u8(entry, at + 1));
                if !joined && target.last() != Some(&b'/') {
                    target.push(b'/');
                }
                match flags & 0x0e {
                    2 => target.push(b'.'),
                    4 => target.extend_from_slice(b".."),
                    8 => target.push(b'/'),
                    _ => target.extend_from_slice(text),
                }
                // The component goes on in the next record.
                joined = flags & 1 != 0;
            }
        }
        any.then_some(target)
    }

    /// The block of the directory that this stands for: deep ones are moved.
    pub(super) fn moved_to(&self) -> Option<u32> {
        self.first(b"CL").map(|entry| le::u32(entry, 4))
    }

    /// Whether this is the moved one, which is listed where it belongs.
    pub(super) fn is_moved(&self) -> bool {
        self.first(b"RE").is_some()
    }

    pub(super) fn is_compressed(&self) -> bool {
        self.first(b"ZF").is_some()
    }
}

/// Seven bytes: years from 1900, and quarters of an hour east of UTC at the end.
pub(super) fn short_time(bytes: &[u8]) -> Timestamp {
    let at = |index: usize| i64::from(u8(bytes, index));
    if at(1) == 0 {
        return Timestamp::default();
    }
    let time = civil((1900 + at(0), at(1), at(2)), (at(3), at(4), at(5)));
    Timestamp { seconds: time.seconds - i64::from(u8(bytes, 6).cast_signed()) * 900, nanoseconds: 0 }
}
