//! [`Stream`]: copies a recovery's disks in the background, and moves the guest onto the copy. The rules, and the order
//! of a cutover: docs/design/rehydration.md

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::compare::Pass;
use super::copier::{CopyError, Move};
use super::pace::Pace;

/// How often the guest's latency is looked at.
const WINDOW: Duration = Duration::from_millis(250);
/// How often what is copied is noted.
const NOTE: Duration = Duration::from_secs(5);
/// How long to rest when nothing is open.
const REST: Duration = Duration::from_secs(1);
/// Longest sleep before a stop is looked at.
const NAP: Duration = Duration::from_millis(20);
/// First and longest wait before a repository that cannot be read is tried again.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// A cutover closes the gates when this little is open, or after this many passes.
pub const LITTLE: u64 = 64;
const HURRIED_PASSES: u32 = 5;
/// A disk whose open regions take less than this to copy without a limit is ready, however much the guest writes.
pub const SHORT: Duration = Duration::from_secs(1);

/// Where the copying stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Copying what is open, or comparing what is copied.
    Copying,
    /// All is copied, and compared before the guest may be moved onto it.
    Comparing,
    /// All is copied and proven; what the guest writes is copied as it comes.
    Ready,
    /// The disk cannot be read; tried again by itself.
    Retrying(String),
    /// The target failed; nothing is copied until somebody says so.
    Held(String),
}

/// What is shown of a stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Where it stands.
    pub phase: Phase,
    /// Bytes copied a second, over the last windows.
    pub rate: f64,
    /// Bytes the guest changes a second.
    pub dirty_rate: f64,
    /// Mean time of the guest's requests in microseconds, if there were any.
    pub latency_us: Option<u64>,
}

/// A look at disks on their way.
pub trait Watch: Send + Sync + std::fmt::Debug {
    /// Where it stands.
    fn progress(&self) -> Progress;

    /// Bytes of a disk that are on its target already.
    fn hydrated(&self, disk: usize) -> u64;
}

impl Watch for Shared {
    fn progress(&self) -> Progress {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn hydrated(&self, disk: usize) -> u64 {
        self.moves.get(disk).map_or(0, Move::hydrated)
    }
}

/// Disks on their way.
#[derive(Debug)]
pub struct Stream {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    moves: Vec<Move>,
    pace: Pace,
    stop: AtomicBool,
    done: AtomicBool,
    progress: Mutex<Progress>,
}

impl Stream {
    /// Begins to note what the guest changes, and to copy.
    pub fn start(moves: Vec<Move>, limit: Option<u64>) -> std::io::Result<Stream> {
        for one in &moves {
            one.disk.track(Some(one.regions.clone()));
        }
        let progress = Progress { phase: Phase::Copying, rate: 0.0, dirty_rate: 0.0, latency_us: None };
        let shared = Arc::new(Shared {
            moves,
            pace: Pace::new(limit),
            stop: AtomicBool::new(false),
            done: AtomicBool::new(false),
            progress: Mutex::new(progress),
        });
        let mut stream = Stream { shared, thread: None };
        stream.go_on()?;
        Ok(stream)
    }

    /// Copies again after [`Stream::halt`].
    pub fn go_on(&mut self) -> std::io::Result<()> {
        self.halt();
        self.shared.stop.store(false, Ordering::Release);
        self.shared.done.store(false, Ordering::Release);
        self.shared.show(Phase::Copying);
        let shared = self.shared.clone();
        self.thread = Some(thread::Builder::new().name("rehydrate".to_owned()).spawn(move || shared.run())?);
        Ok(())
    }

    /// Stops copying, and returns when nothing is in flight. What the guest changes is noted on.
    pub fn halt(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that copied has panicked");
        }
    }

    /// Stops copying until [`Stream::go_on`], and says why.
    pub fn hold(&mut self, why: &str) {
        self.halt();
        self.shared.show(Phase::Held(why.to_owned()));
    }

    /// Stops copying and noting.
    pub fn end(mut self) {
        self.halt();
        for one in &self.shared.moves {
            one.disk.track(None);
        }
    }

    /// For those who look on.
    pub fn watch(&self) -> Arc<dyn Watch> {
        self.shared.clone()
    }

    /// Copies what is left, holds the guest for the very last, and calls `decide` when the targets are whole, proven
    /// and durable; if that succeeds the guest goes on on the targets, else on the overlays. Returns how long the guest
    /// was held. Blocks; afterwards nothing is copied any more unless it failed and [`Stream::go_on`] is called.
    pub fn cut_over<E: From<CopyError>>(&mut self, decide: impl FnOnce() -> Result<(), E>) -> Result<Duration, E> {
        self.halt();
        let (moves, never) = (&self.shared.moves, AtomicBool::new(false));
        let hurry = Pace::unlimited();
        let settle = |one: &Move| -> Result<(), CopyError> {
            one.pass(Pass::Copy, &hurry, &never)?;
            one.pass(Pass::Prove, &hurry, &never)
        };
        for _ in 0..HURRIED_PASSES {
            for one in moves {
                settle(one)?;
                one.sync()?;
            }
            if moves.iter().map(|one| one.regions.unproven()).sum::<u64>() <= LITTLE {
                break;
            }
        }
        let began = Instant::now();
        let closed: Vec<_> = moves.iter().map(|one| one.disk.close()).collect();
        for one in moves {
            // A comparison that failed opened its regions again: with the guest held, the second time it is right.
            while one.regions.unproven() > 0 {
                settle(one)?;
            }
            one.sync()?;
        }
        decide()?;
        for (one, closed) in moves.iter().zip(&closed) {
            let description = format!("{} on {}", one.name, one.place);
            one.disk.switch(closed, one.target.clone(), description);
        }
        drop(closed);
        Ok(began.elapsed())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.halt();
    }
}

impl Shared {
    fn run(&self) {
        thread::scope(|scope| {
            scope.spawn(|| self.watch());
            let mut retry = RETRY.0;
            while !self.stopped() {
                match self.round() {
                    Ok(()) => retry = RETRY.0,
                    Err(error @ CopyError::Source { .. }) => {
                        let error = crate::problem::chain(&error);
                        tracing::warn!(error, "rehydration waits and tries again");
                        self.show(Phase::Retrying(error));
                        self.sleep(retry);
                        retry = (retry * 2).min(RETRY.1);
                    }
                    Err(error) => {
                        let error = crate::problem::chain(&error);
                        tracing::error!(error, "rehydration is held; the guest runs on");
                        self.show(Phase::Held(error));
                        break;
                    }
                }
            }
            self.done.store(true, Ordering::Release);
        });
    }

    /// Copies and proves once, until all is as the guest sees it.
    fn round(&self) -> Result<(), CopyError> {
        for one in &self.moves {
            one.copy_recent(&self.pace, &self.stop)?;
        }
        for one in &self.moves {
            one.pass(Pass::Copy, &self.pace, &self.stop)?;
        }
        if self.moves.iter().any(|one| one.regions.unproven() > 0) {
            for one in &self.moves {
                one.note()?;
                one.pass(Pass::Prove, &self.pace, &self.stop)?;
            }
            let left: u64 = self.moves.iter().map(|one| one.regions.open()).sum();
            // A guest that never rests never lets all be proven at once, and one that writes faster than the limit lets
            // be copied never lets little be open: what counts is how long the cutover would hold it.
            let time: Duration = self.moves.iter().map(Move::time_left).sum();
            if left > LITTLE && time > SHORT {
                self.show(Phase::Copying);
                return Ok(());
            }
        }
        if !self.stopped() {
            self.show(Phase::Ready);
            self.sleep(REST);
        }
        Ok(())
    }

    /// Beside the copying: keeps the pace, what is shown, and the notes for a restart.
    fn watch(&self) {
        let (mut noted, mut at, mut before) = (Instant::now(), Instant::now(), self.copied());
        while !self.stopped() && !self.done.load(Ordering::Acquire) {
            self.sleep(WINDOW);
            let latency = self.moves.iter().filter_map(|one| one.disk.take_latency()).max();
            self.pace.felt(latency);
            let (copied, seconds) = (self.copied(), at.elapsed().as_secs_f64());
            let changed: u64 = self.moves.iter().map(|one| one.disk.take_changed()).sum();
            {
                let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
                let blend = |old: f64, new: u64| old * 0.75 + new as f64 / seconds * 0.25;
                progress.rate = blend(progress.rate, copied - before);
                progress.dirty_rate = blend(progress.dirty_rate, changed);
                progress.latency_us = latency.map(|latency| u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
            }
            (before, at) = (copied, Instant::now());
            if noted.elapsed() >= NOTE {
                for one in &self.moves {
                    if let Err(error) = one.note() {
                        // The pass that runs meets the target's failure itself.
                        tracing::warn!(error = %crate::problem::chain(&error), "what is copied cannot be noted");
                    }
                }
                noted = Instant::now();
            }
        }
    }

    fn copied(&self) -> u64 {
        self.moves.iter().map(|one| one.copied.load(Ordering::Relaxed)).sum()
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Sleeps, but not past `stop`.
    fn sleep(&self, long: Duration) {
        let until = Instant::now() + long;
        while !self.stopped() && Instant::now() < until {
            thread::sleep(NAP.min(until.saturating_duration_since(Instant::now())));
        }
    }

    fn show(&self, phase: Phase) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).phase = phase;
    }
}
