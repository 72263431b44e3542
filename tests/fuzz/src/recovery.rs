//! The files of a recovery: its journal, and what its rehydration has copied.

use std::path::PathBuf;
use std::sync::OnceLock;

use lifeboat::journal::{Journal, JournalError};
use lifeboat::rehydrate::written_before;
use serde_json::Value;
use tempfile::TempDir;

use crate::{Input, seal};

fn path() -> PathBuf {
    static DIR: OnceLock<TempDir> = OnceLock::new();
    let dir = DIR.get_or_init(|| crate::images::memory_dir("journal"));
    dir.path().join(format!("{:?}", std::thread::current().id()))
}

/// With the first byte even, each line gets the checksum of its text.
pub(crate) fn journal(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    let mut bytes = rest.to_vec();
    if kind % 2 == 0 {
        bytes.clear();
        for line in rest.split_inclusive(|byte| *byte == b'\n') {
            let text = line.get(9..).unwrap_or_default();
            let (text, end) = text.strip_suffix(b"\n").map_or((text, &b""[..]), |text| (text, b"\n"));
            bytes.extend(format!("{:08x} ", crc32c::crc32c(text)).bytes());
            bytes.extend([text, end].concat());
        }
    }
    let path = path();
    std::fs::write(&path, &bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    match Journal::open::<Value>(&path) {
        Ok((mut journal, records)) => {
            let added = journal.append(&Value::from("more"));
            added.unwrap_or_else(|error| panic!("a journal that opened takes no record: {error}"));
            drop(journal);
            let again = Journal::open::<Value>(&path).map(|(_, again)| again.len());
            assert_eq!(again.ok(), Some(records.len() + 1), "records were lost or made up");
        }
        Err(JournalError::Damaged { .. }) => {
            let kept = std::fs::read(&path).unwrap_or_default();
            assert!(kept == bytes, "a journal that is refused must be left alone");
        }
        Err(error) => panic!("{error}"),
    }
}

pub(crate) fn journal_seeds() -> Vec<Vec<u8>> {
    let line = |json: &str| format!("{:08x} {json}\n", crc32c::crc32c(json.as_bytes()));
    let good: String = [
        r#"{"record":"created","version":1,"definition":{"name":"vm","disks":[{"name":"disk0","size":4096}]}}"#,
        r#"{"record":"state","state":"running"}"#,
        r#"{"record":"state","state":"failed","problem":"no \u00e4 memory"}"#,
    ]
    .into_iter()
    .map(line)
    .collect();
    let torn = good.trim_end().to_owned();
    [(0, &good), (1, &good), (0, &torn), (1, &torn)]
        .into_iter()
        .map(|(kind, text)| [&[kind], text.as_bytes()].concat())
        .collect()
}

/// Three bytes for the number of 4 KiB blocks on the disk, then the file: as it is, and as one of this disk.
pub(crate) fn hydrated(data: &[u8]) {
    let mut input = Input::new(data);
    let size = input.number(3) * 4096;
    let bytes = input.rest();
    let mut sealed = bytes.to_vec();
    seal::put(&mut sealed, 0, b"LBOATHY1");
    seal::put(&mut sealed, 8, &size.to_le_bytes());
    if let Some(end) = sealed.len().checked_sub(4) {
        seal::crc(&mut sealed, 0..end, end);
    }
    let path = path();
    for bytes in [bytes, &sealed] {
        std::fs::write(&path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let set = written_before(&path, size);
        assert_eq!(set.regions(), size.div_ceil(65536));
        assert!(set.count() <= set.regions(), "regions past the end of the disk");
        assert!((0..set.regions()).filter(|region| set.contains(*region)).count() as u64 == set.count());
    }
}

pub(crate) fn hydrated_seeds() -> Vec<Vec<u8>> {
    // 70 regions and a bit, in two words.
    let (blocks, size) = (70 * 16 + 1_u32, (70 * 16 + 1) * 4096_u64);
    let file = |words: [u64; 2]| {
        let numbers = [size, 65536, words[0], words[1]];
        let mut bytes = [&b"LBOATHY1"[..], &numbers.map(u64::to_le_bytes).concat()].concat();
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        [&blocks.to_le_bytes()[..3], &bytes].concat()
    };
    vec![file([0, 0]), file([u64::MAX, 0x7f]), file([5, 1 << 6])]
}
