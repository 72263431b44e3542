//! Random operations against a plain array.

use std::thread;

use proptest::prelude::*;

use super::super::map::State;
use super::*;

#[derive(Debug, Clone)]
enum Step {
    Write { offset: u64, length: u64, byte: u8 },
    Zero { offset: u64, length: u64, allocate: bool },
    Trim { offset: u64, length: u64 },
    Flush,
    Reopen,
}

const DISK: u64 = 40 * 4096 + 777;

/// Any range, small ones and such at grain borders more often.
fn range() -> impl Strategy<Value = (u64, u64)> {
    let offset = prop_oneof![0..DISK, (0..DISK / 4096).prop_map(|grain| grain * 4096), Just(DISK - 777)];
    let length = prop_oneof![1..600u64, 1..20_000u64, (1..6u64).prop_map(|grains| grains * 4096), Just(777)];
    (offset, length).prop_map(|(offset, length)| (offset, length.min(DISK - offset)))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (range(), 1..=255u8).prop_map(|((offset, length), byte)| Step::Write { offset, length, byte }),
        2 => (range(), any::<bool>()).prop_map(|((offset, length), allocate)| Step::Zero { offset, length, allocate }),
        2 => range().prop_map(|(offset, length)| Step::Trim { offset, length }),
        2 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ]
}

fn part(model: &mut [u8], offset: u64, length: u64) -> &mut [u8] {
    &mut model[usize::try_from(offset).unwrap()..][..usize::try_from(length).unwrap()]
}

proptest! {
    #[test]
    fn an_overlay_agrees_with_an_array(
        steps in prop::collection::vec(step(), 1..60),
        compact_min in prop_oneof![Just(1u64), Just(8192), Just(1 << 20)],
        look in range(),
    ) {
        let folder = SimFolder::new(7);
        let mut overlay = create(&folder, DISK).unwrap();
        overlay.journal.lock().unwrap().set_compact_min(compact_min);
        let mut model = base_bytes(DISK);
        for step in steps {
            match step {
                Step::Write { offset, length, byte } => {
                    let data = vec![byte; usize::try_from(length).unwrap()];
                    overlay.write(offset, &data).unwrap();
                    part(&mut model, offset, length).fill(byte);
                }
                Step::Zero { offset, length, allocate } => {
                    overlay.write_zeroes(offset, length, allocate).unwrap();
                    part(&mut model, offset, length).fill(0);
                }
                Step::Trim { offset, length } => {
                    overlay.trim(offset, length).unwrap();
                    part(&mut model, offset, length).fill(0);
                }
                Step::Flush => overlay.flush().unwrap(),
                Step::Reopen => {
                    drop(overlay); // as if the process had been killed: nothing acknowledged is lost
                    overlay = open(&folder, DISK).unwrap();
                    overlay.journal.lock().unwrap().set_compact_min(compact_min);
                }
            }
            prop_assert_eq!(&read(&overlay, look.0, look.1), part(&mut model, look.0, look.1));
        }
        prop_assert_eq!(&read(&overlay, 0, DISK), &model);
        // What is called a hole or unchanged is one.
        let mut at = 0;
        for extent in overlay.extents(0, DISK, 1000).unwrap() {
            prop_assert!(!extent.hole || part(&mut model, at, extent.length).iter().all(|byte| *byte == 0));
            at += extent.length;
        }
        prop_assert_eq!(at, DISK);
        let mut at = 0;
        for extent in overlay.changed(0, DISK, 1000) {
            let unchanged = (at..at + extent.length).map(base_byte);
            prop_assert!(extent.changed || unchanged.eq(part(&mut model, at, extent.length).iter().copied()));
            at += extent.length;
        }
        prop_assert_eq!(at, DISK);
    }
}

#[test]
fn writers_of_different_bytes_of_one_grain_do_not_undo_each_other() {
    let folder = SimFolder::new(3);
    let overlay = create(&folder, SIZE).unwrap();
    thread::scope(|scope| {
        for thread in 0..4u8 {
            let overlay = &overlay;
            scope.spawn(move || {
                for round in 0..50u8 {
                    for grain in 0..8u64 {
                        let offset = grain * 4096 + u64::from(thread) * 1000;
                        overlay.write(offset, &[thread * 60 + round + 1; 1000]).unwrap();
                        assert_eq!(read(overlay, offset, 1000), [thread * 60 + round + 1; 1000]);
                    }
                    if thread == 0 {
                        overlay.trim(32 * 4096, 8 * 4096).unwrap();
                        overlay.write(33 * 4096 + 5, b"kept").unwrap();
                    }
                    if round % 8 == 0 {
                        overlay.flush().unwrap();
                    }
                }
            });
        }
    });
    overlay.flush().unwrap();
    drop(overlay);
    let overlay = open(&folder.after_crash(), SIZE).unwrap();
    for grain in 0..8 {
        for thread in 0..4u8 {
            assert_eq!(read(&overlay, grain * 4096 + u64::from(thread) * 1000, 1000), [thread * 60 + 50; 1000]);
        }
    }
    assert_eq!(read(&overlay, 33 * 4096 + 5, 4), b"kept");
}

#[test]
fn two_parts_of_a_grain_that_is_fetched_from_a_slow_base_both_arrive() {
    let base = TestBase::new(SIZE);
    base.slow.store(true, Ordering::Relaxed);
    let overlay = Overlay::create(Arc::new(SimFolder::new(3)), dir(), identity(SIZE), base).unwrap();
    thread::scope(|scope| {
        for thread in 0..4u8 {
            let overlay = &overlay;
            scope.spawn(move || {
                for grain in 0..20u64 {
                    overlay.write(grain * 4096 + u64::from(thread) * 1000, &[thread + 1; 900]).unwrap();
                }
                // A whole grain needs nothing from the base, and must not be undone by one that does.
                overlay.write(30 * 4096, &[9; 4096]).unwrap();
                overlay.write(30 * 4096 + u64::from(thread) * 1000, &[9; 900]).unwrap();
            });
        }
    });
    for grain in 0..20 {
        for thread in 0..4u8 {
            assert_eq!(read(&overlay, grain * 4096 + u64::from(thread) * 1000, 900), [thread + 1; 900]);
        }
    }
    assert_eq!(read(&overlay, 30 * 4096, 4096), [9; 4096]);
}

#[test]
fn acknowledged_writes_outlive_a_killed_process_and_the_next_flush_covers_them() {
    for turn in [0, 60_000u64] {
        let folder = SimFolder::new(turn);
        let size = 400_000 * 4096;
        let overlay = create(&folder, size).unwrap();
        // Enough changes to go over to the second file with one flush, and back with another.
        for round in 0..3 {
            for grain in 10 + round * turn..10 + (round + 1) * turn {
                overlay.mark(2 * grain..2 * grain + 1, State::Zero).unwrap();
            }
            overlay.flush().unwrap();
        }
        overlay.write(4096, &[1; 4096]).unwrap();
        overlay.flush().unwrap();
        overlay.write(4096, &[2; 100]).unwrap(); // journalled already
        overlay.write(3 * 4096 + 5, &[3; 100]).unwrap(); // known to no flush
        overlay.trim(5 * 4096, 4096).unwrap();
        let usage = overlay.usage();
        drop(overlay);
        let overlay = open(&folder, size).unwrap();
        let check = |overlay: &Overlay| {
            assert_eq!(read(overlay, 4096, 200), [[2; 100], [1; 100]].concat());
            assert_eq!(read(overlay, 3 * 4096 + 5, 100), [3; 100]);
            assert_eq!(read(overlay, 5 * 4096, 4096), [0; 4096]);
        };
        check(&overlay);
        assert_eq!(overlay.usage(), usage);
        overlay.flush().unwrap();
        drop(overlay);
        let overlay = open(&folder.after_crash(), size).unwrap();
        check(&overlay);
        assert_eq!(overlay.usage().zero_grains, usage.zero_grains);
    }
}

#[test]
fn a_damaged_list_of_recent_changes_is_believed_up_to_the_damage() {
    let path = dir().join("recent.0");
    for offset in 0..64 + 3 * 20 {
        let folder = SimFolder::new(1);
        let overlay = create(&folder, SIZE).unwrap();
        for grain in 0..3 {
            overlay.write(grain * 8192, &[1; 4096]).unwrap();
        }
        drop(overlay);
        let file = folder.open_exclusive(&path).unwrap();
        assert_eq!(file.len().unwrap(), 64 + 3 * 20);
        let mut byte = [0];
        file.read_at(offset, &mut byte).unwrap();
        file.write_at(offset, &[byte[0] ^ 0x10]).unwrap();
        drop(file);
        let believed = match offset {
            0..36 => 0,
            36..64 => 3, // reserved
            _ => (offset - 64) / 20,
        };
        let overlay = open(&folder, SIZE).unwrap();
        assert_eq!(overlay.usage().data_grains, believed, "byte {offset}");
        overlay.write(20 * 4096, &[1; 4096]).unwrap();
        drop(overlay);
        assert_eq!(open(&folder, SIZE).unwrap().usage().data_grains, believed + 1);
    }
}
