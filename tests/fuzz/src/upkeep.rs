//! What stands beside the data: leases, the quarantine, what the last collect knew, protections, lists of verified packs,
//! drills.
//!
//! Each input takes its object's place in a repository that is otherwise whole, as it is and with good checksums. Then
//! everything that reads such an object is done; whatever it says, the points that are listed stay readable.

use std::sync::OnceLock;

use blockstore::drill::{Attachments, BootTrace, DrillRecord, TracedDisk};
use blockstore::format::protection::{PROTECTION_LEN, StoredProtection};
use blockstore::format::{drill as stored, note, verified};
use blockstore::lease::Verdict;
use blockstore::sim::SimFolder;
use blockstore::{
    CollectOptions, DataCheck, DrillId, LeaseKind, PackId, Progress, RecoveryPointId, Repository, VerifyOptions,
};
use serde_json::{Value, json};

use crate::objects::{REPOSITORY, open, storage, write};
use crate::repository::{files, read_all, real_one};
use crate::seal;

fn repository() -> SimFolder {
    static WHOLE: OnceLock<SimFolder> = OnceLock::new();
    WHOLE.get_or_init(real_one).after_kill()
}

/// Names below a folder of the repository.
fn names(dir: &str) -> Vec<String> {
    let named = |path: &std::path::Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    files(&repository()).iter().filter(|(path, _)| path.starts_with(dir)).filter_map(|(path, _)| named(path)).collect()
}

fn put(path: &str, object: &[u8]) -> (SimFolder, Repository) {
    let folder = repository();
    write(&folder, path, object);
    let repository = open(&folder).unwrap_or_else(|error| panic!("with {path} it does not open: {error}"));
    (folder, repository)
}

/// A collect that does not wait; what it does not free it must not need. Then every point is read.
fn collect(folder: &SimFolder, repository: &Repository) {
    for dry_run in [true, false] {
        let options = CollectOptions { dry_run, reclaim_now: true, threshold: 100, ..CollectOptions::default() };
        let _ = repository.collect(&options, &Progress::new());
    }
    if let Ok(keyless) = Repository::open_keyless(storage(folder)) {
        let _ = keyless.rehearse_collect();
    }
    let again = open(folder).unwrap_or_else(|error| panic!("after a collect it does not open: {error}"));
    read_all(&again);
}

/// With the first byte even, the rest is a note's text.
fn as_note(data: &[u8], magic: &[u8; 8], check: impl Fn(&[u8])) {
    let Some((kind, rest)) = data.split_first() else { return };
    let mut bytes = match kind % 2 {
        0 => [&[0; note::HEADER_LEN], rest].concat(),
        _ => rest.to_vec(),
    };
    seal::put(&mut bytes, 0, magic);
    if kind % 2 == 0 {
        seal::put(&mut bytes, 16, &REPOSITORY.0);
    }
    seal::note(&mut bytes);
    check(rest);
    check(&bytes);
}

fn note_seeds(texts: &[Value]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| [&[0], text.to_string().as_bytes()].concat()).collect()
}

pub(crate) fn lease(data: &[u8]) {
    as_note(data, &note::LEASE, |bytes| {
        let (folder, repository) = put(&format!("leases/{}", "ab".repeat(16)), bytes);
        let leases = repository.leases().unwrap_or_else(|error| panic!("leases cannot be listed: {error}"));
        let [lease] = &leases[..] else { panic!("one lease stands there, not {leases:?}") };
        assert_eq!(lease.record.is_none(), matches!(lease.verdict, Verdict::Unreadable(_)));
        assert!(!lease.holder().is_empty());
        collect(&folder, &repository);
    });
}

pub(crate) fn lease_seeds() -> Vec<Vec<u8>> {
    let folder = repository();
    let repository = open(&folder).unwrap_or_else(|error| panic!("it does not open: {error}"));
    let points: Vec<_> =
        names("points").iter().filter_map(|name| repository.load_point(name.parse().ok()?).ok()).collect();
    let held: Vec<_> = points.iter().collect();
    let kinds = [LeaseKind::Backup, LeaseKind::Reader, LeaseKind::Recovery, LeaseKind::Collect];
    let taken: Vec<_> = kinds.iter().map(|kind| repository.lease(*kind, "export of web01", &held)).collect();
    let text = |bytes: Vec<u8>| [&[0], bytes.get(note::HEADER_LEN..).unwrap_or_default()].concat();
    let leases =
        files(&folder).into_iter().filter(|(path, _)| path.starts_with("leases")).map(|(_, bytes)| text(bytes));
    let seeds = leases.collect();
    drop(taken);
    seeds
}

pub(crate) fn quarantine(data: &[u8]) {
    as_note(data, &note::QUARANTINE, |bytes| {
        let (folder, repository) = put(&format!("quarantine/{}", "ab".repeat(16)), bytes);
        collect(&folder, &repository);
    });
}

pub(crate) fn quarantine_seeds() -> Vec<Vec<u8>> {
    let packs = names("packs");
    note_seeds(&[
        json!({"created": 1_700_000_000, "due": 1_700_000_001, "waits": [], "packs": packs}),
        json!({"created": 1, "due": 2, "waits": null, "packs": packs}),
        json!({"created": 1, "due": u64::MAX, "waits": ["ab".repeat(16)], "packs": ["cd".repeat(32)]}),
    ])
}

pub(crate) fn liveness(data: &[u8]) {
    as_note(data, &note::LIVENESS, |bytes| {
        let (folder, repository) = put("liveness", bytes);
        if let Ok(keyless) = Repository::open_keyless(storage(&folder)) {
            let _ = keyless.rehearse_collect();
        }
        collect(&folder, &repository);
    });
}

pub(crate) fn liveness_seeds() -> Vec<Vec<u8>> {
    let packs: Vec<Value> =
        names("packs").iter().map(|pack| json!({"pack": pack, "bytes": 1000, "live_bytes": 10})).collect();
    note_seeds(&[json!({
        "created": 1_700_000_000, "points": names("points"), "points_count": 2, "live_bytes": 5000, "packs": packs,
        "dead_bytes": u64::MAX,
    })])
}

/// Whatever protects a point, or claims to: it is kept, or it goes; another one is not touched.
pub(crate) fn protection(data: &[u8]) {
    static POINTS: OnceLock<Vec<RecoveryPointId>> = OnceLock::new();
    let points = POINTS.get_or_init(|| names("points").iter().filter_map(|name| name.parse().ok()).collect());
    let (Some(point), Some(other)) = (points.first(), points.last()) else { panic!("there are two points") };
    let mut sealed = data.to_vec();
    seal::crc(&mut sealed, 0..PROTECTION_LEN - 4, PROTECTION_LEN - 4);
    for bytes in [data, &sealed] {
        if let Ok(stored) = StoredProtection::decode(bytes) {
            let encoded = stored.encode();
            assert_eq!(StoredProtection::decode(&encoded), Ok(stored));
        }
        let (_, repository) = put(&format!("protected/{point}"), bytes);
        let protected = repository.protection(*point);
        let protected = protected.unwrap_or_else(|error| panic!("the protection cannot be looked at: {error}"));
        let held = protected.is_none_or(|protected| protected.holds_at(1000));
        assert_eq!(repository.protections().map(|all| all.len()).ok(), Some(1));
        assert_eq!(repository.forget(*point, Some(*other), 1000).is_err(), held);
        assert!(repository.load_point(*other).is_ok());
        if held {
            assert!(repository.unprotect(*point).is_ok(), "what cannot be read cannot be taken away");
            assert!(repository.forget(*point, Some(*other), 1000).is_ok());
        }
    }
}

pub(crate) fn protection_seeds() -> Vec<Vec<u8>> {
    let point = names("points").first().and_then(|name| name.parse().ok()).unwrap_or(RecoveryPointId([1; 32]));
    let stored = |until_unix_s| StoredProtection { repository: REPOSITORY, point, created_unix_s: 10, until_unix_s };
    [None, Some(500), Some(u64::MAX)].map(|until| stored(until).encode().to_vec()).into()
}

pub(crate) fn verified(data: &[u8]) {
    let mut sealed = data.to_vec();
    seal::put(&mut sealed, 12, &u32::try_from(data.len().saturating_sub(64) / 40).unwrap_or(u32::MAX).to_le_bytes());
    seal::crc(&mut sealed, 0..60, 60);
    for bytes in [data, &sealed] {
        if let Ok(entries) = verified::decode(bytes, REPOSITORY) {
            assert!(verified::encode(REPOSITORY, &entries).len() == bytes.len());
        }
        let (folder, repository) = put(&format!("verified/{}", blake3::hash(bytes).to_hex()), bytes);
        for data in [DataCheck::PerMille(300), DataCheck::All] {
            let options = VerifyOptions { data, ..VerifyOptions::default() };
            let report = repository.verify(options, &Progress::new());
            assert!(report.is_ok_and(|report| report.is_ok()), "a list of verified packs is a hint, no more");
        }
        read_all(&open(&folder).unwrap_or_else(|error| panic!("it does not open: {error}")));
    }
}

pub(crate) fn verified_seeds() -> Vec<Vec<u8>> {
    let mut packs: Vec<PackId> = names("packs").iter().filter_map(|name| name.parse().ok()).collect();
    packs.sort_unstable();
    let entries: Vec<(PackId, u64)> = packs.into_iter().map(|pack| (pack, 1_700_000_000)).collect();
    vec![verified::encode(REPOSITORY, &entries), verified::encode(REPOSITORY, &[])]
}

/// The first byte says what the rest is: the object, or what is attached.
pub(crate) fn drill(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    if let Ok(attached) = Attachments::decode(rest) {
        assert_eq!(Attachments::decode(&attached.encode()), Ok(attached));
    }
    let Some(point) = names("points").first().and_then(|name| name.parse().ok()) else { panic!("there is a point") };
    let id = DrillId { point, time_unix_ms: 0x19a };
    let envelope = |text: &[u8], rest: &[u8]| {
        let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let encryption = blockstore::format::Encryption::None;
        let envelope = stored::Envelope {
            encryption,
            repository: REPOSITORY,
            id,
            salt: [1; 32],
            text_len: len(text),
            rest_len: len(rest),
        };
        let store = |plain| zstd::bulk::compress(plain, 1).unwrap_or_default();
        envelope.encode(&store(text), &store(rest))
    };
    let mut bytes = match kind % 3 {
        0 => rest.to_vec(),
        1 => envelope(b"{}", rest),
        _ => envelope(rest, &Attachments::default().encode()),
    };
    seal::drill(&mut bytes);
    let (folder, repository) = put(&format!("drills/{id}"), &bytes);
    assert_eq!(repository.drills().ok(), Some(vec![id]));
    let (summary, whole) = (repository.drill_summary(id), repository.drill(id));
    assert!(whole.is_err() || summary.is_ok(), "whole, but without a summary");
    let report = repository.verify(VerifyOptions::default(), &Progress::new());
    let report = report.unwrap_or_else(|error| panic!("it cannot be verified: {error}"));
    assert_eq!(report.is_ok(), whole.is_ok(), "{whole:?}");
    // A newer one takes the place of one that is damaged, and every point stays readable.
    let record = DrillRecord { summary: json!({}), attached: Attachments::default() };
    repository.keep_drill(point, 0x19b, &record).unwrap_or_else(|error| panic!("no drill can be kept: {error}"));
    assert!(repository.drills().is_ok_and(|drills| (1..=2).contains(&drills.len())));
    collect(&folder, &repository);
}

pub(crate) fn drill_seeds() -> Vec<Vec<u8>> {
    let trace = BootTrace { disks: vec![TracedDisk { disk: "disk0".into(), chunks: vec![7, 3, 1 << 30, 4] }] };
    let attached = Attachments { console: b"login: ".to_vec(), screenshot: b"\x89PNG".to_vec(), trace };
    let object = {
        let folder = repository();
        let repository = open(&folder).unwrap_or_else(|error| panic!("it does not open: {error}"));
        let Some(point) = names("points").first().and_then(|name| name.parse().ok()) else {
            panic!("there is a point")
        };
        let record = DrillRecord { summary: json!({ "result": "passed" }), attached: attached.clone() };
        repository.keep_drill(point, 0x19a, &record).unwrap_or_else(|error| panic!("no drill can be kept: {error}"));
        files(&folder).into_iter().find(|(path, _)| path.starts_with("drills")).map(|(_, bytes)| bytes)
    };
    let tagged = |kind: u8, bytes: &[u8]| [&[kind], bytes].concat();
    vec![
        tagged(0, &object.unwrap_or_default()),
        tagged(1, &attached.encode()),
        tagged(2, br#"{"result": "failed", "stage": "kernel"}"#),
    ]
}
