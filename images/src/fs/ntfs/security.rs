//! Who owns an object and who may use it, as Windows knows it: security descriptors, which the file `$Secure` keeps once
//! for all objects that have the same. Its stream `$SDS` holds them one behind the other; every other block of 256 KiB is
//! a copy of the one before.

use std::collections::HashMap;

use crate::DiskImage;
use crate::bytes::{le, part, size};
use crate::fs::{FsError, NodeId, read_vec};

/// The record of `$Secure`.
pub(super) const RECORD: NodeId = NodeId(9);
pub(super) const STREAM: &str = "$SDS";
const BLOCK: u64 = 256 << 10;
/// Longest stream that is read.
const LENGTH_MAX: u64 = 256 << 20;
const HEADER: u64 = 20;
/// Longest descriptor; Windows makes no longer ones.
const DESCRIPTOR_MAX: u64 = 64 << 10;

/// Where each descriptor lies in the stream, by its number.
pub(super) struct Descriptors {
    stream: Box<dyn DiskImage>,
    places: HashMap<u32, (u64, usize)>,
}

impl Descriptors {
    pub(super) fn read(stream: Box<dyn DiskImage>) -> Result<Descriptors, FsError> {
        let mut places = HashMap::new();
        let end = stream.size().min(LENGTH_MAX);
        let mut start = 0;
        while start < end {
            let block = read_vec(stream.as_ref(), &RECORD, start, size(BLOCK.min(end - start)))?;
            let mut at = 0;
            loop {
                let header = part(&block, size(at), size(HEADER));
                let length = u64::from(le::u32(header, 16));
                // The rest of a block, if it is too short for the next, is zeroes.
                if length <= HEADER || length > HEADER + DESCRIPTOR_MAX || le::u64(header, 8) != start + at {
                    break;
                }
                places.insert(le::u32(header, 4), (start + at + HEADER, size(length - HEADER)));
                at = (at + length).next_multiple_of(16);
            }
            start += 2 * BLOCK;
        }
        Ok(Descriptors { stream, places })
    }

    /// The descriptor of this number, if there is one.
    pub(super) fn find(&self, number: u32) -> Result<Option<Vec<u8>>, FsError> {
        let Some((at, length)) = self.places.get(&number) else { return Ok(None) };
        read_vec(self.stream.as_ref(), &RECORD, *at, *length).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::test_support::Memory;

    #[test]
    fn descriptors_lie_in_every_other_block() {
        let mut stream = vec![0; size(3 * BLOCK)];
        let mut add = |at: u64, number: u32, text: &[u8]| {
            let bytes = [
                &[0; 4][..],
                &number.to_le_bytes(),
                &at.to_le_bytes(),
                &u32::try_from(20 + text.len()).unwrap().to_le_bytes(),
                text,
            ]
            .concat();
            stream[size(at)..size(at) + bytes.len()].copy_from_slice(&bytes);
        };
        add(0, 256, b"first");
        add(32, 257, b"the second");
        add(BLOCK, 300, b"no copy");
        add(2 * BLOCK, 258, b"third");
        let found = Descriptors::read(Box::new(Memory(stream))).unwrap();
        let text = |number| found.find(number).unwrap();
        assert_eq!(text(256).as_deref(), Some(&b"first"[..]));
        assert_eq!(text(257).as_deref(), Some(&b"the second"[..]));
        assert_eq!(text(258).as_deref(), Some(&b"third"[..]));
        assert_eq!((text(300), text(1)), (None, None));
    }
}
