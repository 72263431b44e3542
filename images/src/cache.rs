//! A bounded cache of blocks below a file system, which reads the same few places of its disk again and again.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use quick_cache::sync::Cache;

use crate::bytes::{part, size};
use crate::{DiskImage, SharedDisk};

/// What is read and kept at a time.
const BLOCK: u64 = 16 << 10;
/// Blocks kept: 32 MiB of them.
const BLOCKS_MAX: usize = 2048;
/// Reads from this length on are file content and not kept.
const PASS_THROUGH: usize = 64 << 10;

/// A disk whose blocks are kept once read. It must not change.
pub struct Cached {
    disk: SharedDisk,
    blocks: Cache<u64, Arc<[u8]>>,
}

impl Cached {
    /// Keeps blocks of `disk`.
    pub fn new(disk: SharedDisk) -> Cached {
        Cached { disk, blocks: Cache::new(BLOCKS_MAX) }
    }

    fn block(&self, number: u64) -> io::Result<Arc<[u8]>> {
        self.blocks.get_or_insert_with(&number, || {
            let start = number * BLOCK;
            let mut bytes = vec![0; size(BLOCK.min(self.disk.size().saturating_sub(start)))];
            self.disk.read_at(start, &mut bytes)?;
            Ok(bytes.into())
        })
    }
}

impl DiskImage for Cached {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if buf.len() >= PASS_THROUGH {
            return self.disk.read_at(offset, buf);
        }
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let block = self.block(at / BLOCK)?;
            let found = part(&block, size(at % BLOCK), rest.len());
            if found.is_empty() {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the read reaches past the disk's end"));
            }
            let (filled, left) = std::mem::take(&mut rest).split_at_mut(found.len());
            filled.copy_from_slice(found);
            at += found.len() as u64;
            rest = left;
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.disk.next_data(offset)
    }

    fn describe(&self) -> String {
        self.disk.describe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::test_support::Memory;

    #[test]
    fn what_is_kept_is_what_the_disk_holds() {
        let bytes: Vec<u8> = (0..100_003_u32).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let cached = Cached::new(Arc::new(Memory(bytes.clone())));
        for (offset, length) in [(0, 1), (16_383, 2), (5, 40_000), (100_000, 3), (1, 100_002), (16_384, 0)] {
            for _ in 0..2 {
                let mut buf = vec![0xee; length];
                cached.read_at(offset, &mut buf).unwrap();
                assert_eq!(buf, bytes[size(offset)..][..length], "{offset}+{length}");
            }
        }
        assert!(cached.read_at(100_000, &mut [0; 4]).is_err());
        assert!(cached.read_at(u64::MAX, &mut [0; 4]).is_err());
    }
}
