//! The power goes off at each operation in turn: what a completed flush covered is there, the rest is old or new.

use std::collections::BTreeSet;

use super::*;
use crate::sim::SimFolder;

const DISK: u64 = 24 * 4096 + 1500;

/// What each byte may read as after a crash: its value at the last flush that completed, or a later one.
struct Promise {
    flushed: Vec<u8>,
    now: Vec<u8>,
    /// As `now`, without the operation under way.
    acknowledged: Vec<u8>,
    later: Vec<BTreeSet<u8>>,
}

impl Promise {
    fn new(bytes: Vec<u8>) -> Promise {
        Promise {
            later: vec![BTreeSet::new(); bytes.len()],
            now: bytes.clone(),
            acknowledged: bytes.clone(),
            flushed: bytes,
        }
    }

    /// Before the operation, because it may be cut off in the middle.
    fn will_write(&mut self, offset: u64, data: &[u8]) {
        let start = usize::try_from(offset).unwrap();
        for (at, byte) in (start..).zip(data) {
            self.now[at] = *byte;
            self.later[at].insert(*byte);
        }
    }

    fn has_written(&mut self) {
        self.acknowledged.clone_from(&self.now);
    }

    /// After the end of the process alone.
    fn assert_acknowledged(&self, found: &[u8], context: &str) {
        for (at, byte) in found.iter().enumerate() {
            let (old, new) = (self.acknowledged[at], self.now[at]);
            assert!(*byte == old || *byte == new, "{context}: byte {at} is {byte}, was {old}, maybe {new}");
        }
    }

    fn has_flushed(&mut self) {
        self.flushed.clone_from(&self.now);
        self.later.iter_mut().for_each(BTreeSet::clear);
    }

    fn assert_kept(&self, found: &[u8], context: &str) {
        assert_eq!(found.len(), self.flushed.len());
        for (at, byte) in found.iter().enumerate() {
            let allowed = *byte == self.flushed[at] || self.later[at].contains(byte);
            assert!(
                allowed,
                "{context}: byte {at} is {byte}, was flushed as {}, later {:?}",
                self.flushed[at], self.later[at]
            );
        }
    }
}

/// Numbers from a seed (the generator of Park and Miller).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = (self.0 + 1) * 48271 % 0x7fff_ffff;
        (self.0 >> 3) % bound
    }
}

/// Opens an overlay that compacts its journal at `compact_min` and goes over to the other file of recent changes often.
fn open_tuned(folder: &SimFolder, compact_min: u64) -> Result<Overlay, OverlayError> {
    let overlay = open(folder, DISK)?;
    overlay.journal.lock().unwrap().set_compact_min(compact_min);
    overlay.recent.as_ref().unwrap().set_turn_at(64 + 3 * 20);
    Ok(overlay)
}

/// Runs the workload of a seed until it ends or the machine is off; now and then the process is killed and another
/// goes on.
fn run(folder: &SimFolder, compact_min: u64, promise: &mut Promise, seed: u64, steps: u64) -> Result<(), OverlayError> {
    let mut overlay = open_tuned(folder, compact_min)?;
    let mut numbers = Numbers(seed);
    for step in 0..steps {
        promise.has_written();
        let offset = match numbers.below(3) {
            0 => numbers.below(DISK / 4096) * 4096,
            1 => numbers.below(DISK / 512) * 512,
            _ => numbers.below(DISK),
        };
        let length = [700, 4096, 512, 9000, 20_000, 70_000][usize::try_from(numbers.below(6)).unwrap()];
        let length = length.min(DISK - offset);
        let byte = u8::try_from(1 + (seed + step) % 250).unwrap();
        match numbers.below(10) {
            0 | 1 => {
                overlay.flush()?;
                promise.has_flushed();
            }
            2 => {
                promise.will_write(offset, &vec![0; usize::try_from(length).unwrap()]);
                overlay.trim(offset, length)?;
            }
            3 => {
                promise.will_write(offset, &vec![0; usize::try_from(length).unwrap()]);
                overlay.write_zeroes(offset, length, step % 2 == 0)?;
            }
            4 => {
                drop(overlay);
                overlay = open_tuned(folder, compact_min)?;
                let mut found = Vec::new();
                overlay.read(0, DISK, &mut found)?;
                assert!(flatten(&found) == promise.now, "seed {seed}: an acknowledged write went with the process");
            }
            // A compaction, with a flush, and a trim that is not flushed, while the new journal is written.
            5 => {
                let next = overlay.begin_compaction();
                let data = vec![byte; usize::try_from(length).unwrap()];
                promise.will_write(offset, &data);
                overlay.write(offset, &data)?;
                promise.has_written();
                let written = next.map(|next| next.write(&overlay.place, &overlay.map));
                overlay.flush()?;
                promise.has_flushed();
                promise.will_write(0, &[0; 9000]);
                overlay.trim(0, 9000)?;
                promise.has_written();
                written.map_or(Ok(()), |written| overlay.finish_compaction(written))?;
            }
            _ => {
                let data = vec![byte; usize::try_from(length).unwrap()];
                promise.will_write(offset, &data);
                overlay.write(offset, &data)?;
            }
        }
    }
    Ok(())
}

/// Opens what a crash left; an overlay whose creation did not complete is created again.
fn reopen(folder: &SimFolder, created: bool, context: &str) -> Overlay {
    match open(folder, DISK) {
        Ok(overlay) => overlay,
        Err(OverlayError::Missing { .. }) if !created => {
            create(folder, DISK).unwrap_or_else(|error| panic!("{context}: {error}"))
        }
        Err(error) => panic!("{context}: {error}"),
    }
}

fn crash_everywhere(seed: u64, compact_min: u64) {
    const STEPS: u64 = 40;
    let counted = SimFolder::new(seed);
    drop(create(&counted, DISK).unwrap());
    run(&counted, compact_min, &mut Promise::new(base_bytes(DISK)), seed, STEPS).unwrap();
    let operations = counted.operations();
    assert!(operations > 50);
    for cut in 0..=operations {
        let folder = SimFolder::new(seed).crash_at(cut);
        let mut promise = Promise::new(base_bytes(DISK));
        let created = create(&folder, DISK).map(|overlay| {
            drop(overlay);
            // A last operation that gives space back, or prepares the journal, may fail unseen.
            let _ = run(&folder, compact_min, &mut promise, seed, STEPS);
            assert_eq!(folder.is_off(), cut < operations, "seed {seed}, cut {cut}");
        });
        // Only the process was killed; what another one finds, and then flushes, stays.
        let context = format!("seed {seed}, killed at {cut} of {operations}, compaction {compact_min}");
        let killed = folder.after_kill();
        let overlay = reopen(&killed, created.is_ok(), &context);
        let found = read(&overlay, 0, DISK);
        promise.assert_acknowledged(&found, &context);
        overlay.flush().unwrap();
        drop(overlay);
        for outcome in 0..3 {
            let after = killed.after_crash_with(seed ^ (outcome << 32));
            assert!(read(&reopen(&after, true, &context), 0, DISK) == found, "{context}: a flush lost something");
        }
        for outcome in 0..4 {
            let context =
                format!("seed {seed}, cut {cut} of {operations}, outcome {outcome}, compaction {compact_min}");
            let after = folder.after_crash_with(seed ^ (outcome << 32));
            let overlay = reopen(&after, created.is_ok(), &context);
            let found = read(&overlay, 0, DISK);
            promise.assert_kept(&found, &context);

            // Life goes on, and the power goes off again, also while the tail of the first crash is being cut off.
            let mut promise = Promise::new(found);
            drop(overlay);
            let again = after.after_crash_with(outcome).crash_at(cut * 7 % 23 + outcome);
            let _ = run(&again, compact_min, &mut promise, seed + outcome + 1, 12);
            let last = again.after_crash();
            let overlay = reopen(&last, true, &context);
            promise.assert_kept(&read(&overlay, 0, DISK), &context);
        }
    }
}

#[test]
fn flushed_writes_survive_a_crash_at_every_disk_operation() {
    for seed in 1..=4 {
        crash_everywhere(seed, 4 << 20);
    }
}

#[test]
fn flushed_writes_survive_a_crash_at_every_disk_operation_of_compactions() {
    for seed in 11..=12 {
        crash_everywhere(seed, 1);
        crash_everywhere(seed, 6000);
    }
}

#[test]
fn a_power_cut_takes_nothing_that_was_flushed_while_others_wrote() {
    for seed in 0..30 {
        let folder = SimFolder::new(seed).crash_at(40 + seed * 9);
        let Ok(overlay) = create(&folder, DISK) else { panic!("the cut comes later") };
        // Each thread owns six grains, and knows the last round of its own that was flushed.
        let flushed: Vec<u8> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4u64)
                .map(|thread| {
                    let overlay = &overlay;
                    scope.spawn(move || {
                        let mut flushed = 0;
                        for round in 1..=50u8 {
                            let written = (0..6)
                                .try_for_each(|grain| overlay.write((thread * 6 + grain) * 4096 + 100, &[round; 3000]));
                            if written.and_then(|()| overlay.flush()).is_err() {
                                break;
                            }
                            flushed = round;
                        }
                        flushed
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        drop(overlay);
        let overlay = open(&folder.after_crash(), DISK).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        for (thread, flushed) in flushed.into_iter().enumerate() {
            for grain in 0..6 {
                let offset = (thread as u64 * 6 + grain) * 4096 + 100;
                let found = read(&overlay, offset, 3000);
                let base = base_bytes(DISK);
                let at = usize::try_from(offset).unwrap();
                if flushed == 0 && found == base[at..at + 3000] {
                    continue;
                }
                let old_or_new = found.iter().all(|byte| *byte == flushed || *byte == flushed + 1);
                assert!(old_or_new || flushed == 0, "seed {seed}, thread {thread}: flushed {flushed}, found {found:?}");
            }
        }
    }
}
