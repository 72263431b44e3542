//! The file that tells a restart which regions are copied. Specification: docs/format/hydrated.md

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use super::regions::{REGION, RegionSet};

const MAGIC: [u8; 8] = *b"LBOATHY1";
const HEADER: usize = 24;

/// Replaces the file. Durable when it returns. `written` is what was copied before the target was last synced.
pub fn write(path: &Path, size: u64, written: &[u8]) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(HEADER + written.len() + 4);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&size.to_le_bytes());
    bytes.extend_from_slice(&REGION.to_le_bytes());
    bytes.extend_from_slice(written);
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

/// The regions that are copied. A file that is missing or damaged says none: copying starts anew.
pub fn read(path: &Path, size: u64) -> RegionSet {
    let none = || RegionSet::new(size);
    let max = HEADER as u64 + size.div_ceil(REGION).div_ceil(64) * 8 + 4;
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(max + 1).read_to_end(&mut bytes));
    match read {
        Ok(_) => decode(&bytes, size).unwrap_or_else(|| {
            tracing::warn!(file = %path.display(), "damaged: what was copied before the restart is copied again");
            none()
        }),
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(file = %path.display(), %error, "unreadable: what was copied is copied again");
            }
            none()
        }
    }
}

fn decode(bytes: &[u8], size: u64) -> Option<RegionSet> {
    let (body, crc) = bytes.split_last_chunk::<4>()?;
    let (magic, rest) = body.split_first_chunk::<8>()?;
    let (disk, rest) = rest.split_first_chunk::<8>()?;
    let (region, words) = rest.split_first_chunk::<8>()?;
    let fits = *magic == MAGIC
        && crc32c::crc32c(body) == u32::from_le_bytes(*crc)
        && u64::from_le_bytes(*disk) == size
        && u64::from_le_bytes(*region) == REGION;
    fits.then(|| RegionSet::from_bytes(size, words)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_comes_back_and_damage_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hydrated");
        let size = 70 * REGION + 1;
        let set = RegionSet::new(size);
        assert_eq!(read(&path, size).count(), 0);
        set.insert(3);
        set.insert(70);
        write(&path, size, &set.to_bytes()).unwrap();
        let back = read(&path, size);
        assert!(back.contains(3) && back.contains(70));
        assert_eq!(back.count(), 2);
        assert_eq!(read(&path, size + REGION).count(), 0);
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(decode(&bad, size).is_none(), "byte {at}");
            assert!(decode(&good[..at], size).is_none(), "cut at {at}");
        }
    }
}
