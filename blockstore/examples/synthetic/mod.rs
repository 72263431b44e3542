//! Repositories as large as wanted, without data: an index that names packs which are not there, or packs that are all
//! table and hole.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use blockstore::format::Encryption;
use blockstore::format::pack::{ENTRY_LEN, FOOTER_LEN, Frame, HEADER_LEN, Header, PackKind, encode_end};
use blockstore::format::run::{Entry, PackRow, encode};
use blockstore::{ChunkId, PackId, RepositoryId};

/// Entries of a run, as merges make them.
const RUN: u64 = 1 << 20;

/// What is made.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Chunks.
    pub chunks: u64,
    /// Packs that hold them.
    pub packs: u64,
    /// What a chunk takes in its pack.
    pub stored: u32,
}

impl Shape {
    /// Unique data of this many bytes, of which two fifths are left after compression, in packs of 32 MiB.
    pub fn of(bytes: u64, chunk_size: u32) -> Shape {
        let stored = chunk_size / 5 * 2;
        let chunks = bytes / u64::from(chunk_size);
        Shape { chunks, packs: (chunks * u64::from(stored)).div_ceil(32 << 20), stored }
    }

    /// The id of a chunk; they rise with the number, as evenly as hashes lie.
    pub fn id(&self, number: u64) -> ChunkId {
        let width = u64::MAX / self.chunks;
        let mut id = [0; 32];
        let (prefix, rest) = id.split_at_mut(8);
        prefix.copy_from_slice(&(number * width + mix(number) % width).to_be_bytes());
        rest.iter_mut().zip(mix(!number).to_le_bytes().iter().cycle()).for_each(|(to, from)| *to = *from);
        ChunkId(id)
    }
}

/// The finalizer of SplitMix64.
pub fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The name of a pack; they rise with the number.
fn pack_id(number: u64) -> PackId {
    let mut id = [0; 32];
    let (prefix, rest) = id.split_at_mut(8);
    prefix.copy_from_slice(&number.to_be_bytes());
    rest.iter_mut().zip(mix(number).to_le_bytes().iter().cycle()).for_each(|(to, from)| *to = *from);
    PackId(id)
}

/// Writes the runs of one merged layer into `index/`. Returns their bytes.
pub fn write_index(root: &Path, repository: RepositoryId, shape: Shape) -> io::Result<u64> {
    let dir = root.join("index");
    fs::create_dir_all(&dir)?;
    let mut written = 0;
    let mut begin = 0;
    while begin < shape.chunks {
        let end = (begin + RUN).min(shape.chunks);
        let mut packs: Vec<u64> = (begin..end).map(|chunk| mix(chunk) % shape.packs).collect();
        packs.sort_unstable();
        packs.dedup();
        let row = |pack: &u64| PackRow {
            pack: pack_id(*pack),
            salt: [7; 32],
            len: 33 << 20,
            frames: u32::try_from(shape.chunks / shape.packs + 1).unwrap_or(u32::MAX).min(65_535),
            entries: 1,
            kind: PackKind::Data,
            encryption: Encryption::None,
            gathered: false,
        };
        let rows: Vec<PackRow> = packs.iter().map(row).collect();
        let entry = |chunk: u64| Entry {
            id: shape.id(chunk),
            row: u32::try_from(packs.binary_search(&(mix(chunk) % shape.packs)).unwrap_or(0)).unwrap_or(0),
            offset: 80,
            stored_len: shape.stored,
            frame: 0,
            flags: 1,
            level: 0,
        };
        let entries: Vec<Entry> = (begin..end).map(entry).collect();
        let bytes = encode(repository, &rows, &entries);
        fs::write(dir.join(blake3::hash(&bytes).to_hex().as_str()), &bytes)?;
        written += bytes.len() as u64;
        begin = end;
    }
    Ok(written)
}

/// Writes packs that hold these chunks by their tables; where the frames would be are holes.
#[allow(dead_code, reason = "not every program that includes this needs it")]
pub fn write_packs(root: &Path, repository: RepositoryId, shape: Shape) -> io::Result<()> {
    let each = shape.chunks.div_ceil(shape.packs);
    for pack in 0..shape.packs {
        let header =
            Header { kind: PackKind::Data, encryption: Encryption::None, repository, salt: [7; 32], gathered: false };
        let mut frames = Vec::new();
        let mut offset = HEADER_LEN;
        for chunk in pack * each..((pack + 1) * each).min(shape.chunks) {
            let id = shape.id(chunk);
            frames.push(Frame { id, offset, stored_len: shape.stored, plain_len: 65_536, flags: 1, level: 0 });
            offset += shape.stored;
        }
        let mut end = Vec::with_capacity(frames.len() * ENTRY_LEN as usize + FOOTER_LEN as usize);
        encode_end(&frames, offset, &mut end);
        let name: String = pack_id(mix(pack)).to_string();
        let dir = root.join("packs").join(name.get(..2).unwrap_or_default());
        fs::create_dir_all(&dir)?;
        let file = File::create(dir.join(name))?;
        file.write_all_at(&header.encode(), 0)?;
        file.write_all_at(&end, u64::from(offset))?;
    }
    Ok(())
}

/// What this process holds in memory now: of its own, and of mapped files, which the kernel takes back when it wants to.
pub fn memory() -> (u64, u64) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
    };
    (of("RssAnon:"), of("RssFile:"))
}
