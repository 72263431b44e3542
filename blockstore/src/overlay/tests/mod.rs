//! Support for the overlay's tests, and the plain behaviour; the rest stands in the files beside.

mod crash;
mod damage;
mod faults;
mod model;

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;

use super::*;
use crate::base::{Extent, Segment};
use crate::disk::LocalFolder;
use crate::error::ReadError;
use crate::sim::SimFolder;

/// A base with a recognisable byte at each offset, and with holes.
#[derive(Debug)]
pub(super) struct TestBase {
    size: u64,
    fails: AtomicBool,
    slow: AtomicBool,
}

/// Every third piece of this size is a hole.
const PIECE: u64 = 3 * 4096;

fn base_byte(offset: u64) -> u8 {
    if offset / PIECE % 3 == 1 { 0 } else { u8::try_from(1 + (offset / 512 * 7 + offset) % 251).unwrap() }
}

impl TestBase {
    fn new(size: u64) -> Arc<TestBase> {
        Arc::new(TestBase { size, fails: AtomicBool::new(false), slow: AtomicBool::new(false) })
    }
}

impl Base for TestBase {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_resident(&self, offset: u64, length: u64, out: &mut Vec<Segment>) -> bool {
        (offset / PIECE).is_multiple_of(2) && self.read(offset, length, out).is_ok()
    }

    fn read(&self, offset: u64, length: u64, out: &mut Vec<Segment>) -> Result<(), ReadError> {
        if self.fails.load(Ordering::Relaxed) {
            return Err(ReadError::Io { object: "the base".into(), source: io::ErrorKind::TimedOut.into() });
        }
        if self.slow.load(Ordering::Relaxed) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(offset + length <= self.size && length > 0);
        let mut offset = offset;
        let mut left = length;
        while left > 0 {
            let step = left.min(PIECE - offset % PIECE);
            out.push(if base_byte(offset) == 0 {
                Segment::Hole(step)
            } else {
                Segment::Data((offset..offset + step).map(base_byte).collect::<Vec<u8>>().into())
            });
            offset += step;
            left -= step;
        }
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, ReadError> {
        let mut out = Vec::new();
        self.read(offset, length, &mut out)?;
        let extents = out.iter().map(|segment| match segment {
            Segment::Data(bytes) => Extent { length: bytes.len() as u64, hole: false },
            Segment::Hole(length) => Extent { length: *length, hole: true },
        });
        Ok(extents.take(limit).collect())
    }
}

pub(super) fn identity(size: u64) -> OverlayIdentity {
    OverlayIdentity { point: [0xab; 32], disk: "disk0".into(), size }
}

pub(super) fn dir() -> &'static Path {
    Path::new("recovery/disk0")
}

pub(super) fn create(folder: &SimFolder, size: u64) -> Result<Overlay, OverlayError> {
    Overlay::create(Arc::new(folder.clone()), dir(), identity(size), TestBase::new(size))
}

pub(super) fn open(folder: &SimFolder, size: u64) -> Result<Overlay, OverlayError> {
    Overlay::open(Arc::new(folder.clone()), dir(), identity(size), TestBase::new(size))
}

pub(super) fn flatten(segments: &[Segment]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in segments {
        match segment {
            Segment::Data(data) => bytes.extend_from_slice(data),
            Segment::Hole(length) => bytes.resize(bytes.len() + usize::try_from(*length).unwrap(), 0),
        }
    }
    bytes
}

pub(super) fn read(overlay: &Overlay, offset: u64, length: u64) -> Vec<u8> {
    let mut out = Vec::new();
    overlay.read(offset, length, &mut out).unwrap();
    flatten(&out)
}

pub(super) fn base_bytes(size: u64) -> Vec<u8> {
    (0..size).map(base_byte).collect()
}

const SIZE: u64 = 64 * 4096 + 1000;

#[test]
fn a_long_write_reaches_the_data_file_in_pieces() {
    let folder = SimFolder::new(1);
    let overlay = create(&folder, SIZE).unwrap();
    overlay.write(0, &vec![1; usize::try_from(SIZE).unwrap()]).unwrap();
    let bytes: Vec<u8> = (0..200_000u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let before = folder.operations();
    overlay.write(5000, &bytes).unwrap();
    assert_eq!(folder.operations() - before, 7, "cut at multiples of 32 KiB");
    assert_eq!(read(&overlay, 5000, 200_000), bytes);
    assert_eq!(read(&overlay, 4998, 2), [1; 2]);
    assert_eq!(read(&overlay, 205_000, 2), [1; 2]);
}

#[test]
fn a_fresh_overlay_reads_as_its_base_and_keeps_flushed_writes_through_reopening() {
    let root = tempfile::tempdir().unwrap();
    let folder: Arc<dyn Folder> = Arc::new(LocalFolder::new(root.path()));
    let base = TestBase::new(SIZE);
    let overlay = Overlay::create(Arc::clone(&folder), dir(), identity(SIZE), base.clone()).unwrap();
    let mut expected = base_bytes(SIZE);
    assert_eq!(read(&overlay, 0, SIZE), expected);
    for (offset, length) in [(0, 4096), (5000, 10), (8000, 9000), (SIZE - 7, 7), (SIZE - 5000, 4500)] {
        overlay.write(offset, &vec![0xee; length]).unwrap();
        expected[usize::try_from(offset).unwrap()..][..length].fill(0xee);
    }
    overlay.trim(16384, 20000).unwrap();
    expected[16384..36384].fill(0);
    assert_eq!(read(&overlay, 0, SIZE), expected);
    overlay.flush().unwrap();
    drop(overlay);
    let overlay = Overlay::open(Arc::clone(&folder), dir(), identity(SIZE), base).unwrap();
    assert_eq!(read(&overlay, 0, SIZE), expected);
    let names: Vec<_> = folder.list(dir()).unwrap().into_iter().map(|entry| (entry.path, entry.len)).collect();
    assert!(names.len() == 3 && names.contains(&(dir().join("data"), SIZE)), "{names:?}");
}

#[test]
fn a_disk_that_ends_inside_a_grain_works_to_its_last_byte_and_not_beyond() {
    for size in [0, 1, 511, 4095, 4097, 8191] {
        let folder = SimFolder::new(1);
        let overlay = create(&folder, size).unwrap();
        assert!(matches!(overlay.write(size, b"x"), Err(OverlayError::OutOfRange { .. })));
        assert!(matches!(overlay.trim(1, size), Err(OverlayError::OutOfRange { .. })));
        assert!(matches!(overlay.read(u64::MAX, 2, &mut Vec::new()), Err(OverlayError::OutOfRange { .. })));
        assert!(!overlay.read_resident(size, 1, &mut Vec::new()));
        overlay.write(size, b"").unwrap();
        overlay.flush().unwrap();
        if size == 0 {
            continue;
        }
        overlay.write(size - 1, b"z").unwrap();
        overlay.flush().unwrap();
        let mut expected = base_bytes(size);
        *expected.last_mut().unwrap() = b'z';
        assert_eq!(read(&overlay, 0, size), expected);
        overlay.trim(0, size).unwrap();
        assert_eq!(overlay.usage().data_grains, 0, "the last grain is whole although it is short");
        overlay.flush().unwrap();
        drop(overlay);
        let overlay = open(&folder, size).unwrap();
        let mut out = Vec::new();
        assert!(overlay.read_resident(0, size, &mut out));
        assert_eq!(out, [Segment::Hole(size)]);
        assert_eq!(overlay.extents(0, size, 9).unwrap(), [Extent { length: size, hole: true }]);
    }
}

#[test]
fn a_second_opener_and_a_second_creator_are_refused() {
    let folder = SimFolder::new(1);
    assert!(matches!(open(&folder, SIZE), Err(OverlayError::Missing { .. })));
    let overlay = create(&folder, SIZE).unwrap();
    assert!(matches!(open(&folder, SIZE), Err(OverlayError::Busy { .. })));
    assert!(matches!(create(&folder, SIZE), Err(OverlayError::Exists { .. })));
    drop(overlay);
    assert!(matches!(create(&folder, SIZE), Err(OverlayError::Exists { .. })));
    let overlay = open(&folder, SIZE).unwrap();
    // A compaction replaces the journal; the lock holds across that.
    overlay.journal.lock().unwrap().set_compact_min(1);
    overlay.write(0, b"x").unwrap();
    overlay.flush().unwrap();
    assert_eq!(overlay.journal.lock().unwrap().header().generation, 2);
    assert!(matches!(open(&folder, SIZE), Err(OverlayError::Busy { .. })));
}

#[test]
fn an_overlay_of_something_else_is_refused_and_both_are_named() {
    let folder = SimFolder::new(1);
    drop(create(&folder, SIZE).unwrap());
    let attempt = |identity: OverlayIdentity| {
        let base = TestBase::new(identity.size);
        Overlay::open(Arc::new(folder.clone()), dir(), identity, base).map(drop)
    };
    let others = [
        OverlayIdentity { point: [1; 32], ..identity(SIZE) },
        OverlayIdentity { disk: "disk1".into(), ..identity(SIZE) },
        identity(SIZE + 4096),
    ];
    for expected in others {
        let error = attempt(expected.clone()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&expected.to_string()) && text.contains(&identity(SIZE).to_string()), "{text}");
        assert!(matches!(error, OverlayError::Mismatch { .. }));
    }
    attempt(identity(SIZE)).unwrap();
    let wrong_base = Overlay::open(Arc::new(folder.clone()), dir(), identity(SIZE), TestBase::new(SIZE - 1));
    assert!(matches!(wrong_base, Err(OverlayError::BaseSize { .. })));
    let long = OverlayIdentity { disk: "x".repeat(1025), ..identity(SIZE) };
    let refused = Overlay::create(Arc::new(folder), Path::new("other"), long, TestBase::new(SIZE));
    assert!(matches!(refused, Err(OverlayError::Limits)));
}

#[test]
fn extents_and_changes_lay_the_overlay_over_the_base() {
    let overlay = create(&SimFolder::new(1), SIZE).unwrap();
    overlay.write(0, &[1; 100]).unwrap();
    overlay.write_zeroes(4096, 4096, false).unwrap();
    overlay.write_zeroes(8192, 4096, true).unwrap();
    // Grains: data, zero, data; then 3 of hole, 6 of data from the base, 3 of hole, ...
    let found: Vec<_> = overlay.extents(0, SIZE, 5).unwrap().iter().map(|e| (e.length / 4096, e.hole)).collect();
    assert_eq!(found, [(1, false), (1, true), (1, false), (3, true), (6, false)]);
    let found = overlay.extents(5000, 1000, 100).unwrap();
    assert_eq!(found, [Extent { length: 1000, hole: true }]);
    assert_eq!(overlay.extents(10, 10_000, 0).unwrap(), [Extent { length: 4086, hole: false }]);
    let all = overlay.extents(0, SIZE, 1000).unwrap();
    assert_eq!(all.iter().map(|extent| extent.length).sum::<u64>(), SIZE);
    assert!(all.windows(2).all(|pair| pair[0].hole != pair[1].hole));
    let changed = overlay.changed(100, SIZE, 9);
    assert_eq!(
        changed,
        [ChangedExtent { length: 12288 - 100, changed: true }, ChangedExtent { length: SIZE - 12288, changed: false }]
    );
    assert_eq!(overlay.changed(100, SIZE, 1).len(), 1);
    assert!(overlay.changed(SIZE, 1, 9).is_empty() && overlay.changed(u64::MAX, 1, 9).is_empty());
    assert_eq!(overlay.usage().data_grains, 2);
    assert_eq!(overlay.usage().zero_grains, 1);
}

#[test]
fn a_resident_read_is_all_or_nothing() {
    let overlay = create(&SimFolder::new(1), SIZE).unwrap();
    let mut out = vec![Segment::Hole(9)];
    assert!(overlay.read_resident(0, 8192, &mut out));
    assert_eq!(flatten(&out[1..]), base_bytes(8192));
    out.truncate(1);
    overlay.write(4096, &[5; 4096]).unwrap();
    assert!(overlay.read_resident(4000, 300, &mut out));
    assert_eq!(flatten(&out[1..]), read(&overlay, 4000, 300));
    out.truncate(1);
    assert!(!overlay.read_resident(12288, 100, &mut out), "the second piece of the base is not resident");
    assert_eq!(out, [Segment::Hole(9)]);
    let big = create(&SimFolder::new(2), 1 << 20).unwrap();
    big.write(0, &vec![1; 1 << 20]).unwrap();
    assert!(big.read_resident(0, 64 << 10, &mut Vec::new()));
    assert!(!big.read_resident(0, (64 << 10) + 1, &mut Vec::new()), "too much for the caller's thread");
    let root = tempfile::tempdir().unwrap();
    let local =
        Overlay::create(Arc::new(LocalFolder::new(root.path())), dir(), identity(SIZE), TestBase::new(SIZE)).unwrap();
    local.write(0, &[7; 4096]).unwrap();
    let mut out = Vec::new();
    if local.read_resident(0, 4096, &mut out) {
        assert_eq!(out, [Segment::Data(Bytes::from(vec![7; 4096]))]);
    }
}

#[test]
fn a_tebibyte_discarded_and_a_million_extents_stay_small_and_open_fast() {
    const TIB: u64 = 1 << 40;
    let folder = SimFolder::new(1);
    let overlay = create(&folder, TIB).unwrap();
    overlay.trim(0, TIB).unwrap();
    overlay.flush().unwrap();
    assert!(overlay.usage().journal_bytes <= 4096 + 512);
    drop(overlay);
    let overlay = open(&folder, TIB).unwrap();
    assert_eq!(overlay.usage().zero_grains, 1 << 28);
    // A million extents, noted as a million writes would.
    for grain in (0..2_000_000).step_by(2) {
        overlay.map.set(grain..grain + 1, map::State::Data);
        overlay.note(grain..grain + 1);
    }
    overlay.flush().unwrap();
    let bytes = overlay.usage().journal_bytes;
    assert!(bytes > 16_000_000 && bytes < 17_000_000, "{bytes}");
    drop(overlay);
    let overlay = open(&folder.after_crash(), TIB).unwrap();
    assert_eq!(overlay.usage().data_grains, 1_000_000);
    assert_eq!(overlay.map.state(1_999_998), map::State::Data);
    assert_eq!(overlay.map.state(1_999_999), map::State::Zero);
}

#[test]
fn an_overlay_that_lost_a_file_is_refused_whatever_it_holds() {
    for (lost, written) in [("journal", true), ("journal", false), ("data", true)] {
        let folder = SimFolder::new(1);
        let overlay = create(&folder, SIZE).unwrap();
        if written {
            overlay.write(4096, &[7; 4096]).unwrap();
        }
        overlay.flush().unwrap();
        drop(overlay);
        folder.remove(&dir().join(lost)).unwrap();
        for refused in [create(&folder, SIZE), open(&folder, SIZE)] {
            match refused.expect_err("the guest's data may stand there") {
                OverlayError::Damaged { path, damage: Damage::Missing, .. } => assert!(path.ends_with(lost)),
                other => panic!("{other}"),
            }
        }
        if lost == "journal" && written {
            let mut bytes = [0; 4096];
            folder.open_read(&dir().join("data")).unwrap().read_at(4096, &mut bytes).unwrap();
            assert_eq!(bytes, [7; 4096], "untouched");
        }
    }
}

#[test]
fn what_a_crashed_create_left_is_taken_over() {
    let folder = SimFolder::new(1);
    folder.create_dir(dir()).unwrap();
    folder.create(&dir().join("data.new")).unwrap().set_len(SIZE / 2).unwrap();
    folder.create(&dir().join("journal")).unwrap().write_at(0, b"of another overlay").unwrap();
    assert!(matches!(open(&folder, SIZE), Err(OverlayError::Missing { .. })));
    let overlay = create(&folder, SIZE).unwrap();
    overlay.write(0, &[7; 4096]).unwrap();
    overlay.flush().unwrap();
    drop(overlay);
    assert_eq!(read(&open(&folder, SIZE).unwrap(), 0, 4096), [7; 4096]);
}

#[test]
fn a_long_journal_is_compacted_beside_the_flushes_and_keeps_what_they_append() {
    let folder = SimFolder::new(1);
    let overlay = create(&folder, SIZE).unwrap();
    overlay.journal.lock().unwrap().set_compact_min(20_000);
    for round in 0..40u8 {
        overlay.write(u64::from(round) * 4096, &[round; 4096]).unwrap();
        overlay.flush().unwrap();
    }
    let long = overlay.usage().journal_bytes;
    let generation = || overlay.journal.lock().unwrap().header().generation;
    assert!(long > 20_000 && generation() == 1, "flushes leave it to others for a while");
    let next = overlay.begin_compaction().expect("it is long");
    assert!(overlay.begin_compaction().is_none(), "one at a time");
    overlay.maintain().unwrap();
    let written = next.write(&overlay.place, &overlay.map);
    overlay.write(50 * 4096, &[50; 4096]).unwrap();
    overlay.trim(0, 4096).unwrap();
    overlay.flush().unwrap();
    overlay.finish_compaction(written).unwrap();
    assert_eq!(generation(), 2);
    assert!(overlay.usage().journal_bytes < long / 3);
    let overlay = open(&folder.after_crash(), SIZE).unwrap();
    assert_eq!(read(&overlay, 50 * 4096, 4096), [50; 4096]);
    assert_eq!(read(&overlay, 39 * 4096, 4096), [39; 4096]);
    assert_eq!(read(&overlay, 0, 4096), [0; 4096]);
}

#[test]
fn a_resident_write_takes_whole_grains_that_nobody_else_is_at() {
    let folder = SimFolder::new(1);
    let overlay = create(&folder, SIZE).unwrap();
    let refused = [(1, 4096), (0, 100), (4096, 0), (0, 5000), (SIZE - 1000, 999), (SIZE, 4096), (u64::MAX, 2)];
    for (offset, length) in refused {
        assert!(overlay.write_resident(offset, &vec![1; length]).is_none(), "{offset} {length}");
    }
    let turn = overlay.ranges.lock(3..4);
    assert!(overlay.write_resident(2 * 4096, &[1; 8192]).is_none());
    drop(turn);
    overlay.write_resident(2 * 4096, &[1; 8192]).unwrap().unwrap();
    overlay.write_resident(SIZE - 1000, &[2; 1000]).unwrap().unwrap();
    overlay.flush().unwrap();
    drop(overlay);
    let overlay = open(&folder.after_crash(), SIZE).unwrap();
    assert_eq!(read(&overlay, 2 * 4096, 8192), [1; 8192]);
    assert_eq!(read(&overlay, SIZE - 1000, 1000), [2; 1000]);
    assert_eq!(overlay.usage().data_grains, 3);
}
