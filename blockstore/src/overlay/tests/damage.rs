//! The bytes of a journal as they are on disk, and what becomes of damaged ones.

use super::super::format::{Batch, Record, encode_batch};
use super::super::map::State;
use super::*;

fn journal_path() -> PathBuf {
    dir().join("journal")
}

fn file(folder: &SimFolder, path: &Path) -> Vec<u8> {
    let disk = folder.open_read(path).unwrap();
    let mut bytes = vec![0; usize::try_from(disk.len().unwrap()).unwrap()];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn the_journal_has_the_bytes_of_its_specification() {
    let folder = SimFolder::new(1);
    let overlay = create(&folder, SIZE).unwrap();
    overlay.write(2 * 4096, &[1; 2 * 4096]).unwrap();
    overlay.trim(64 * 4096, 1000).unwrap();
    overlay.flush().unwrap();
    overlay.write(0, &[1; 4096]).unwrap();
    overlay.flush().unwrap();
    let bytes = file(&folder, &journal_path());

    let mut header = Vec::new();
    header.extend_from_slice(b"LBOATOJ1");
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&GOLDEN_HEADER_CRC.to_le_bytes());
    header.extend_from_slice(&1u64.to_le_bytes());
    header.extend_from_slice(&263_144u64.to_le_bytes());
    header.extend_from_slice(&4096u32.to_le_bytes());
    header.extend_from_slice(&5u32.to_le_bytes());
    header.extend_from_slice(&[0xab; 32]);
    header.resize(128, 0);
    header.extend_from_slice(b"disk0");
    header.resize(4096, 0);
    assert!(bytes[..4096] == header, "{:02x?}", &bytes[..136]);

    let mut first = Vec::new();
    first.extend_from_slice(b"LBJB");
    first.extend_from_slice(&GOLDEN_BATCH_CRC.to_le_bytes());
    first.extend_from_slice(&1u64.to_le_bytes());
    first.extend_from_slice(&1u64.to_le_bytes());
    first.extend_from_slice(&2u32.to_le_bytes());
    first.extend_from_slice(&GOLDEN_HEADER_CRC.to_le_bytes());
    for (start, count, state) in [(2u64, 2u32, 1u32), (64, 1, 2)] {
        first.extend_from_slice(&start.to_le_bytes());
        first.extend_from_slice(&count.to_le_bytes());
        first.extend_from_slice(&state.to_le_bytes());
    }
    first.resize(512, 0);
    assert!(bytes[4096..4608] == first, "{:02x?}", &bytes[4096..4176]);
    assert_eq!(bytes[4608..4612], *b"LBJB");
    assert_eq!(bytes[4608 + 28..4608 + 32], GOLDEN_BATCH_CRC.to_le_bytes(), "names its predecessor");
    assert!(bytes.len() > 5120 && bytes[5120..].iter().all(|byte| *byte == 0), "the reserve");
}

// CRC-32C, computed apart from this code.
const GOLDEN_HEADER_CRC: u32 = 0xa5f7_9755;
const GOLDEN_BATCH_CRC: u32 = 0x902a_10cd;

/// An overlay with four flushes: grain n is written in flush n, and grain 0 in all.
fn four_flushes() -> SimFolder {
    let folder = SimFolder::new(5);
    let overlay = create(&folder, SIZE).unwrap();
    for flush in 1..=4u8 {
        overlay.write(0, &[flush; 4096]).unwrap();
        overlay.write(u64::from(flush) * 4096, &[flush; 4096]).unwrap();
        overlay.flush().unwrap();
    }
    drop(overlay);
    folder.after_crash()
}

const BATCHES: usize = 4096;

#[test]
fn no_flipped_bit_is_ever_believed() {
    let folder = four_flushes();
    let length = file(&folder, &journal_path()).len();
    let (mut refused, mut cut, mut harmless) = (0, 0, 0);
    let used = BATCHES + 4 * 512;
    let offsets = (0..160).chain((160..BATCHES).step_by(97)).chain(BATCHES..used + 520).chain([length - 1]);
    for (step, offset) in offsets.enumerate() {
        let folder = folder.after_crash();
        let journal = folder.open_exclusive(&journal_path()).unwrap();
        let mut byte = [0];
        journal.read_at(offset as u64, &mut byte).unwrap();
        byte[0] ^= 1 << (step % 8);
        journal.write_at(offset as u64, &byte).unwrap();
        drop(journal);
        match open(&folder, SIZE) {
            Err(OverlayError::Damaged { .. } | OverlayError::Unsupported { .. }) => {
                assert!(offset < BATCHES + 3 * 512, "byte {offset}: only the last batch may be cut");
                refused += 1;
            }
            Err(error) => panic!("byte {offset}: {error}"),
            Ok(overlay) => {
                // Three flushes or four, as a whole; what is journalled reads right.
                let last = overlay.usage().data_grains;
                assert!(last == if offset < used { 4 } else { 5 }, "byte {offset}: {last} grains");
                assert!(offset >= BATCHES + 3 * 512, "byte {offset} was not noticed");
                for flush in 1..last {
                    assert_eq!(read(&overlay, flush * 4096, 4096), [u8::try_from(flush).unwrap(); 4096]);
                }
                assert_eq!(read(&overlay, 4 * 4096, 4096)[0] == 4, last == 5);
                if last == 5 {
                    harmless += 1
                } else {
                    cut += 1
                }
                // The cut is durable, and new batches stand behind it.
                overlay.write(9 * 4096, &[9; 4096]).unwrap();
                overlay.flush().unwrap();
                drop(overlay);
                let again = open(&folder.after_crash(), SIZE).unwrap();
                assert_eq!(read(&again, 9 * 4096, 4096), [9; 4096]);
                assert_eq!(again.usage().data_grains, last + 1);
            }
        }
    }
    assert!(refused > 1500 && cut == 512 && harmless == 521, "{refused} {cut} {harmless}");
}

#[test]
fn a_journal_of_any_length_is_cut_or_refused() {
    let folder = four_flushes();
    for length in (0..BATCHES + 4 * 512 + 2).step_by(41) {
        let folder = folder.after_crash();
        folder.open_exclusive(&journal_path()).unwrap().set_len(length as u64).unwrap();
        match open(&folder, SIZE) {
            Err(OverlayError::Damaged { damage: Damage::TooShort, .. }) => assert!(length < BATCHES),
            Ok(overlay) => {
                let batches = length.checked_sub(BATCHES).unwrap() / 512;
                assert_eq!(overlay.usage().data_grains, if batches == 0 { 0 } else { batches as u64 + 1 });
            }
            Err(error) => panic!("length {length}: {error}"),
        }
    }
}

/// Replaces the journal's batches by `batches`, whatever they say.
fn with_batches(folder: &SimFolder, batches: &[(Batch, &[Record])]) -> SimFolder {
    let folder = folder.after_crash();
    let journal = folder.open_exclusive(&journal_path()).unwrap();
    let mut header_crc = [0; 4];
    journal.read_at(12, &mut header_crc).unwrap();
    let header_crc = u32::from_le_bytes(header_crc);
    journal.set_len(4096).unwrap();
    let mut bytes = Vec::new();
    let mut previous = header_crc;
    for (batch, records) in batches {
        previous = encode_batch(&mut bytes, header_crc, Batch { previous, ..*batch }, records);
    }
    journal.write_at(4096, &bytes).unwrap();
    drop(journal);
    folder
}

#[test]
fn records_that_make_no_sense_are_damage_although_their_checksum_is_right() {
    let folder = four_flushes();
    let batch = Batch { sequence: 1, flush_start: 1, previous: 0, crc: 0 };
    let record = |start, count, state| Record { start, count, state };
    let bad = [
        record(0, 0, State::Data),
        record(0, 1, State::Base),
        record(65, 1, State::Data),
        record(0, 66, State::Zero),
        record(u64::MAX, u32::MAX, State::Zero),
        record(u64::MAX - 1, 1, State::Data),
    ];
    for record in bad {
        let opened = open(&with_batches(&folder, &[(batch, &[record])]), SIZE);
        let damaged = matches!(opened, Err(OverlayError::Damaged { damage: Damage::Field, offset: 4096, .. }));
        assert!(damaged, "{record:?}: {opened:?}");
    }
    let good = record(0, 65, State::Zero);
    let wrong_flush = Batch { flush_start: 2, ..batch };
    assert!(matches!(
        open(&with_batches(&folder, &[(wrong_flush, &[good])]), SIZE),
        Err(OverlayError::Damaged { damage: Damage::Field, .. })
    ));
    let overlay = open(&with_batches(&folder, &[(batch, &[good])]), SIZE).unwrap();
    assert_eq!(overlay.usage().zero_grains, 65);
}

#[test]
fn a_missing_batch_is_a_torn_tail_only_if_no_later_flush_stands_behind_it() {
    let folder = four_flushes();
    let record = [Record { start: 0, count: 1, state: State::Zero }];
    let batch = |sequence, flush_start| Batch { sequence, flush_start, previous: 0, crc: 0 };
    // 3 is missing: 4 belongs to the flush that began with 3, or to one that came after it.
    let same = with_batches(&folder, &[(batch(1, 1), &record), (batch(2, 2), &record), (batch(4, 3), &record)]);
    open(&same, SIZE).unwrap();
    let later = with_batches(&folder, &[(batch(1, 1), &record), (batch(2, 2), &record), (batch(4, 4), &record)]);
    assert!(matches!(
        open(&later, SIZE),
        Err(OverlayError::Damaged { damage: Damage::Batch { sequence: 3 }, offset: 5120, .. })
    ));
}

#[test]
fn what_an_earlier_history_left_behind_is_never_taken_for_a_batch() {
    let folder = four_flushes();
    let old = file(&folder, &journal_path());
    // The same journal goes on from its second batch; the old third and fourth come back behind a new third.
    let other = folder.after_crash();
    other.open_exclusive(&journal_path()).unwrap().set_len((BATCHES + 2 * 512) as u64).unwrap();
    let overlay = open(&other, SIZE).unwrap();
    overlay.trim(0, 4096).unwrap();
    overlay.flush().unwrap();
    drop(overlay);
    let journal = other.open_exclusive(&journal_path()).unwrap();
    journal.write_at((BATCHES + 3 * 512) as u64, &old[BATCHES + 3 * 512..BATCHES + 4 * 512]).unwrap();
    drop(journal);
    let overlay = open(&other, SIZE).unwrap();
    assert_eq!((overlay.usage().data_grains, overlay.usage().zero_grains), (2, 1));
}

#[test]
fn missing_or_short_files_are_named() {
    let folder = four_flushes();
    let short = folder.after_crash();
    short.open_exclusive(&dir().join("data")).unwrap().set_len(SIZE - 1).unwrap();
    assert!(matches!(open(&short, SIZE), Err(OverlayError::Damaged { damage: Damage::TooShort, .. })));
    let gone = folder.after_crash();
    gone.remove(&dir().join("data")).unwrap();
    assert!(matches!(open(&gone, SIZE), Err(OverlayError::Damaged { damage: Damage::Missing, .. })));
}

#[test]
fn a_header_of_another_kind_is_refused_by_name() {
    let folder = four_flushes();
    for (offset, expected) in [(0, "magic"), (9, "features 0x100"), (40, "checksum")] {
        let folder = folder.after_crash();
        let mut bytes = file(&folder, &journal_path());
        bytes[offset] ^= 1;
        if offset == 9 {
            bytes[12..16].fill(0);
            let crc = crc32c::crc32c(&bytes[..4096]);
            bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        }
        folder.open_exclusive(&journal_path()).unwrap().write_at(0, &bytes).unwrap();
        let error = open(&folder, SIZE).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

proptest::proptest! {
    #[test]
    fn no_content_of_the_files_makes_opening_panic(
        start in 0usize..6000,
        noise in proptest::collection::vec(proptest::num::u8::ANY, 1..2000),
        magic in 0usize..4,
        recent in proptest::collection::vec(proptest::num::u8::ANY, 0..300),
    ) {
        let folder = four_flushes();
        let journal = folder.open_exclusive(&journal_path()).unwrap();
        journal.write_at(start as u64, &noise).unwrap();
        journal.write_at((BATCHES + magic * 512) as u64, b"LBJB").unwrap();
        drop(journal);
        folder.create(&dir().join("recent.1")).unwrap().write_at(0, &recent).unwrap();
        match open(&folder, SIZE) {
            Ok(overlay) => assert_eq!(read(&overlay, 0, SIZE).len() as u64, SIZE),
            Err(OverlayError::Damaged { .. } | OverlayError::Unsupported { .. } | OverlayError::Mismatch { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}
