//! [`PackBuffer`]: a growing buffer whose bytes begin at the border of a page, so that storage can hand them to a device
//! without a copy into the page cache.

use std::ops::{Deref, DerefMut};

use crate::disk::DIRECT_ALIGN;
use crate::format::config::MAX_CHUNK_SIZE;
use crate::format::pack::{ENTRY_LEN, MAX_FRAMES, TARGET_PACK_LEN};

/// A pack never outgrows this, so the buffer is never moved. Memory that is not written to takes no room.
const ROOM: usize =
    TARGET_PACK_LEN as usize + MAX_CHUNK_SIZE as usize + (MAX_FRAMES * ENTRY_LEN) as usize + DIRECT_ALIGN + 4096; // tags, header, footer

/// The bytes of a pack in the making.
#[derive(Debug, Default)]
pub(crate) struct PackBuffer {
    memory: Vec<u8>,
    start: usize,
}

impl PackBuffer {
    /// Empties the buffer and makes it ready for a pack.
    pub fn clear(&mut self) {
        self.memory.clear();
        self.memory.reserve_exact(ROOM);
        self.start = self.memory.as_ptr().addr().wrapping_neg() % DIRECT_ALIGN;
        self.memory.resize(self.start, 0);
    }

    /// Appends bytes.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.memory.extend_from_slice(bytes);
    }

    /// The buffer, for appending.
    pub fn end(&mut self) -> &mut Vec<u8> {
        &mut self.memory
    }
}

impl Deref for PackBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.memory.get(self.start..).unwrap_or_default()
    }
}

impl DerefMut for PackBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.get_mut(self.start..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_begin_at_a_border_and_stay_there() {
        let mut bytes = PackBuffer::default();
        assert!(bytes.is_empty());
        for round in 1..=2u8 {
            bytes.clear();
            let place = bytes.as_ptr().addr();
            assert_eq!(place % DIRECT_ALIGN, 0);
            (0..39).for_each(|_| bytes.extend(&vec![round; 1 << 20]));
            assert_eq!((bytes.as_ptr().addr(), bytes.len()), (place, 39 << 20));
            assert!(bytes.iter().all(|byte| *byte == round));
        }
    }
}
