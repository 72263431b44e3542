//! Objects of a repository, each for itself.

use std::path::Path;
use std::sync::Arc;

use blockstore::disk::Folder;
use blockstore::format::Encryption;
use blockstore::format::config::Config;
use blockstore::format::pack::{Frame, Header, PackKind, decode_pack, encode_end};
use blockstore::format::point::{Envelope, HEADER_LEN};
use blockstore::format::run::Layout;
use blockstore::format::slot::{Slot, Stretch};
use blockstore::sim::SimFolder;
use blockstore::{ChunkId, LocalStorage, RecoveryPointId, Repository, RepositoryId, SlotId, Storage};

use crate::{repository, seal};

/// The repository that everything here belongs to.
pub(crate) const REPOSITORY: RepositoryId = RepositoryId([7; 16]);
/// The smallest there is.
pub(crate) const CHUNK: u32 = 16 << 10;

pub(crate) fn plain_config() -> Config {
    Config { repository: REPOSITORY, chunk_size: CHUNK, encryption: Encryption::None }
}

/// As it is, and with good checksums.
fn both(data: &[u8], seal: impl Fn(&mut [u8]), check: impl Fn(&[u8])) {
    check(data);
    let mut sealed = data.to_vec();
    seal(&mut sealed);
    check(&sealed);
}

pub(crate) fn config(data: &[u8]) {
    both(
        data,
        |bytes| seal::crc(bytes, 0..60, 60),
        |bytes| {
            if let Ok(config) = Config::decode(bytes) {
                assert_eq!(Config::decode(&config.encode()), Ok(config));
            }
        },
    );
}

pub(crate) fn config_seeds() -> Vec<Vec<u8>> {
    let sealed = Config { encryption: Encryption::Aes256Gcm, ..plain_config() };
    vec![plain_config().encode().to_vec(), sealed.encode().to_vec()]
}

pub(crate) fn key_slot(data: &[u8]) {
    both(
        data,
        |bytes| seal::crc(bytes, 0..252, 252),
        |bytes| {
            if let Ok(slot) = Slot::decode(bytes) {
                if let Stretch::Passphrase { memory_kib, passes, lanes } = slot.stretch {
                    assert!(memory_kib <= 1 << 20 && passes <= 16 && lanes <= 16, "too costly: {slot:?}");
                }
                assert_eq!(Slot::decode(&slot.encode()), Ok(slot));
            }
        },
    );
}

pub(crate) fn key_slot_seeds() -> Vec<Vec<u8>> {
    let stretches = [Stretch::KeyFile, Stretch::Passphrase { memory_kib: 65536, passes: 3, lanes: 1 }];
    let slot = |stretch| Slot {
        id: SlotId([1; 16]),
        repository: REPOSITORY,
        created_unix_s: 1_700_000_000,
        stretch,
        salt: [3; 32],
        check: [4; 16],
        nonce: [5; 12],
        sealed: [6; 48],
        label: "spare key, Zürich".into(),
    };
    stretches.map(|stretch| slot(stretch).encode().to_vec()).into()
}

pub(crate) fn pack(data: &[u8]) {
    both(data, seal::pack, |bytes| {
        if let Ok((_, frames)) = decode_pack(bytes) {
            for frame in frames {
                let end = frame.offset as usize + frame.stored_len as usize;
                assert!(end + 32 <= bytes.len(), "outside of the pack: {frame:?}");
            }
        }
    });
}

pub(crate) fn pack_seeds() -> Vec<Vec<u8>> {
    let pack = |kind, encryption, count: u32| {
        let header = Header { kind, encryption, repository: REPOSITORY, salt: [9; 32], gathered: false };
        let mut bytes = header.encode().to_vec();
        let mut frames = Vec::new();
        for number in 0..count {
            let id = ChunkId(*blake3::hash(&number.to_le_bytes()).as_bytes());
            frames.push(Frame { id, offset: 80 + number * 20, stored_len: 20, plain_len: 40, flags: 1, level: 0 });
            bytes.extend([u8::try_from(number).unwrap_or(0); 20]);
        }
        encode_end(&frames, 80 + count * 20, &mut bytes);
        bytes
    };
    vec![
        pack(PackKind::Data, Encryption::None, 0),
        pack(PackKind::Data, Encryption::Aes256Gcm, 3),
        pack(PackKind::Metadata, Encryption::None, 2),
    ]
}

pub(crate) fn index_run(data: &[u8]) {
    both(data, seal::index_run, |bytes| {
        let repository = bytes.get(16..32).and_then(|id| id.try_into().ok()).unwrap_or([0; 16]);
        if let Ok(layout) = Layout::decode(bytes, RepositoryId(repository)) {
            assert_eq!(layout.rows(bytes).len(), layout.packs as usize);
            assert_eq!(layout.entries(bytes).len() as u64, layout.entries);
            layout.entries(bytes).iter().for_each(|entry| assert!(usize::from(entry.get().level) < 256));
        }
    });
}

pub(crate) fn index_run_seeds() -> Vec<Vec<u8>> {
    repository::objects_of_a_real_one(|path| path.starts_with("index/"))
}

/// The first byte says what the rest is: the object, its payload, or its text.
pub(crate) fn point(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    let mut bytes = match kind % 3 {
        0 => rest.to_vec(),
        1 => envelope(u32::try_from(rest.len()).unwrap_or(0).saturating_mul(40)).encode(rest),
        _ => {
            let Ok(payload) = zstd::bulk::compress(rest, 1) else { return };
            envelope(u32::try_from(rest.len()).unwrap_or(u32::MAX)).encode(&payload)
        }
    };
    seal::point(&mut bytes);
    let _ = Envelope::decode(data);
    let _ = Envelope::decode(&bytes);
    let folder = SimFolder::new(1);
    write(&folder, "repository", &plain_config().encode());
    let id = RecoveryPointId(*blake3::hash(&bytes).as_bytes());
    write(&folder, &format!("points/{id}"), &bytes);
    let Ok(repository) = open(&folder) else { panic!("the empty repository does not open") };
    if let Ok(point) = repository.load_point(id) {
        assert_eq!(point.id, id);
        for disk in &point.disks {
            assert!(!disk.name.is_empty() && disk.size <= 1 << 62);
            drop(repository.open_disk(&point, &disk.name));
        }
    }
}

fn envelope(text_len: u32) -> Envelope {
    Envelope { encryption: Encryption::None, repository: REPOSITORY, salt: [2; 32], text_len }
}

pub(crate) fn point_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for object in repository::objects_of_a_real_one(|path| path.starts_with("points/")) {
        seeds.push([&[0], &object[..]].concat());
        let payload = object.get(HEADER_LEN..).unwrap_or_default();
        seeds.push([&[1], payload].concat());
        let text = zstd::bulk::decompress(payload, 1 << 20).unwrap_or_default();
        seeds.push([&[2], &text[..]].concat());
    }
    seeds
}

/// Puts a file into a simulated folder.
pub(crate) fn write(folder: &SimFolder, path: &str, bytes: &[u8]) {
    let path = Path::new(path);
    let place = path.parent().map_or(Ok(()), |dir| folder.create_dir(dir));
    let file = place.and_then(|()| folder.create(path));
    // A name may come twice; the first has it.
    if let Ok(file) = file {
        file.write_at(0, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

pub(crate) fn storage(folder: &SimFolder) -> Arc<dyn Storage> {
    Arc::new(LocalStorage::new(Arc::new(folder.clone())))
}

pub(crate) fn open(folder: &SimFolder) -> Result<Repository, blockstore::OpenError> {
    Repository::open(storage(folder), None, 1 << 20)
}
