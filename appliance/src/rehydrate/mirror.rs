//! [`Mirror`]: disks that the hypervisor copies. It is followed, paced by what the guest feels, and what it wrote is
//! compared with what the guest sees. The rules, and the order of a cutover: docs/design/rehydration.md

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hypervisor::{Cause, Copying, DiskLoad, Machine, MachineError, MirrorError, MirrorProgress, MirrorState, Side};
use tokio::task::JoinHandle;

use super::copier::CopyError;
use super::mirrored::{MirrorFault, Mirrored};
use super::pace::Pace;
use super::stream::{LITTLE, Phase, Progress, SHORT, Watch};
use crate::problem::chain;

/// How often the copy is looked at.
const WINDOW: Duration = Duration::from_millis(250);
/// A copy that was found paused more often than this was paused by somebody, and not by QEMU for a moment.
const PAUSED_LOOKS: u32 = 8;
/// How long to rest between two comparisons.
const REST: Duration = Duration::from_secs(1);
/// First and longest wait before a repository that cannot be read is tried again.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// A cutover holds the guest when this many bytes are left, or after so many passes.
const LITTLE_LEFT: u64 = 16 << 20;
const HURRIED_PASSES: u32 = 5;
/// Longest that a cutover holds the guest before it gives up.
const HOLD_MAX: Duration = Duration::from_secs(10);
/// How often the copy is looked at while the guest is held.
const HELD_LOOK: Duration = Duration::from_millis(2);

/// Disks on their way.
#[derive(Debug)]
pub struct Mirror {
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    vm: Arc<dyn Machine>,
    disks: Vec<Mirrored>,
    pace: Pace,
    stop: AtomicBool,
    /// All is copied; from then on the targets only trail behind the guest.
    ready: AtomicBool,
    /// Little enough is unproven.
    proven: AtomicBool,
    /// What the comparison met.
    fault: Mutex<Option<MirrorFault>>,
    /// How far each disk was when it was last looked at.
    seen: Mutex<Vec<Option<MirrorProgress>>>,
    progress: Mutex<Progress>,
}

/// What a look at the copies has found.
enum Found {
    Copying,
    AllReady,
    Failing(String),
}

impl Mirror {
    /// Begins to note what the guest changes, and has each disk copied: on from where its copy waits, or anew.
    pub async fn start(vm: Arc<dyn Machine>, disks: Vec<Mirrored>, limit: Option<u64>) -> Result<Mirror, MirrorFault> {
        let each = share(limit, disks.iter().filter(|one| !one.moved).count());
        for one in disks.iter().filter(|one| !one.moved) {
            // All is unproven, and stays noted from here on; so the order of this and the copy does not matter.
            tokio::task::block_in_place(|| one.disk.track(Some(one.regions.clone())));
            one.copy(&*vm, each).await.map_err(|source| one.hypervisor(source))?;
        }
        let seen = Mutex::new(vec![None; disks.len()]);
        let progress = Progress { phase: Phase::Copying, rate: 0.0, dirty_rate: 0.0, latency_us: None };
        let shared = Arc::new(Shared {
            vm,
            disks,
            pace: Pace::new(limit),
            stop: AtomicBool::new(false),
            ready: AtomicBool::new(false),
            proven: AtomicBool::new(false),
            fault: Mutex::default(),
            seen,
            progress: Mutex::new(progress),
        });
        let tasks = vec![tokio::spawn(follow(shared.clone())), tokio::spawn(compare(shared.clone()))];
        Ok(Mirror { shared, tasks })
    }

    /// For those who look on.
    pub fn watch(&self) -> Arc<dyn Watch> {
        self.shared.clone()
    }

    /// Stops looking on. The hypervisor copies on.
    pub async fn detach(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for task in self.tasks.drain(..) {
            if let Err(error) = task.await {
                tracing::error!(%error, "what follows a mirror ended badly");
            }
        }
        tokio::task::block_in_place(|| self.shared.disks.iter().for_each(|one| one.disk.track(None)));
    }

    /// Has nothing copied until it is started again, and says why.
    pub async fn hold(&mut self, why: &str) -> Result<(), MirrorFault> {
        for one in self.on_their_way() {
            match self.shared.vm.mirror_pause(one.at).await {
                Ok(()) | Err(MirrorError::NotMirrored { .. } | MirrorError::Machine(MachineError::Gone { .. })) => {}
                Err(source) => return Err(one.hypervisor(source)),
            }
        }
        self.detach().await;
        self.shared.show(Phase::Held(why.to_owned()));
        Ok(())
    }

    /// Gives the copies up. The guest stays where it is.
    pub async fn cancel(&mut self) -> Result<(), MirrorFault> {
        self.detach().await;
        for one in self.on_their_way() {
            match self.shared.vm.mirror_cancel(one.at).await {
                Ok(()) | Err(MirrorError::Machine(MachineError::Gone { .. })) => {}
                Err(source) => return Err(one.hypervisor(source)),
            }
        }
        Ok(())
    }

    /// Before the guest is held: copies and compares without a limit until little is left.
    pub async fn approach(&mut self) -> Result<(), MirrorFault> {
        let shared = &self.shared;
        shared.stop.store(true, Ordering::Release);
        for task in self.tasks.drain(..) {
            // It has nothing to say that is not met again here.
            drop(task.await);
        }
        for one in self.on_their_way() {
            shared.vm.mirror_limit(one.at, None).await.map_err(|source| one.hypervisor(source))?;
        }
        for _ in 0..HURRIED_PASSES {
            let left = shared.left().await?;
            shared.prove(&Hurry::new()).await?;
            let unproven: u64 = shared.disks.iter().map(Mirrored::unproven).sum();
            if left.max(unproven) <= LITTLE_LEFT {
                break;
            }
        }
        Ok(())
    }

    /// While the guest is held: returns when every target holds, durably and proven, what its guest sees.
    pub async fn arrive(&self) -> Result<(), MirrorFault> {
        let (shared, began, hurry) = (&self.shared, Instant::now(), Hurry::new());
        loop {
            let left = shared.left().await?;
            if left == 0 {
                shared.prove(&hurry).await?;
                if shared.disks.iter().all(|one| one.unproven() == 0) {
                    return Ok(());
                }
            }
            if began.elapsed() > HOLD_MAX {
                let slow = shared.disks.iter().max_by_key(|one| one.unproven());
                let disk = slow.map(|one| one.name.clone()).unwrap_or_default();
                let left = left.max(slow.map_or(0, Mirrored::unproven));
                return Err(MirrorFault::Slow { disk, left, held: began.elapsed() });
            }
            tokio::time::sleep(HELD_LOOK).await;
        }
    }

    /// The disks that are not moved yet.
    fn on_their_way(&self) -> impl Iterator<Item = &Mirrored> {
        self.shared.disks.iter().filter(|one| !one.moved)
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// A rate divided among the disks that are being copied.
fn share(rate: Option<u64>, disks: usize) -> Option<u64> {
    rate.map(|rate| (rate / disks.max(1) as u64).max(1))
}

/// What is kept from one look to the next.
struct Kept {
    at: Instant,
    copied: Option<u64>,
    loads: Vec<DiskLoad>,
    /// What each disk was limited to last.
    each: Option<Option<u64>>,
    /// Looks in a row that found a copy paused.
    paused: u32,
}

/// Without a limit and without an end.
struct Hurry(Arc<(Pace, AtomicBool)>);

impl Hurry {
    fn new() -> Hurry {
        Hurry(Arc::new((Pace::unlimited(), AtomicBool::new(false))))
    }
}

/// Looks at the copies until one is held, and keeps their pace.
async fn follow(shared: Arc<Shared>) {
    let (mut retry, mut retried) = (RETRY.0, Instant::now());
    let loads = vec![DiskLoad::default(); shared.disks.len()];
    let mut kept = Kept { at: Instant::now(), copied: None, loads, each: None, paused: 0 };
    while !shared.stopped() {
        let found = match shared.look(&mut kept.paused).await {
            Ok(found) => found,
            Err(fault) => {
                let why = chain(&fault);
                tracing::error!(error = why, "rehydration is held; the guest runs on");
                shared.stop.store(true, Ordering::Release);
                shared.show(Phase::Held(why));
                return;
            }
        };
        let phase = match found {
            Found::Failing(why) => {
                if retried.elapsed() >= retry {
                    tracing::warn!(error = why, "rehydration waits and tries again");
                    shared.resume_stalled().await;
                    (retry, retried) = ((retry * 2).min(RETRY.1), Instant::now());
                }
                Phase::Retrying(why)
            }
            Found::AllReady if shared.proven.load(Ordering::Acquire) => Phase::Ready,
            Found::AllReady => Phase::Comparing,
            Found::Copying => Phase::Copying,
        };
        if !matches!(phase, Phase::Retrying(_)) {
            retry = RETRY.0;
        }
        shared.show(phase);
        shared.keep_pace(&mut kept).await;
        tokio::time::sleep(WINDOW).await;
    }
}

/// Compares what is copied, again and again.
async fn compare(shared: Arc<Shared>) {
    while !shared.stopped() {
        if !shared.ready.load(Ordering::Acquire) {
            tokio::time::sleep(WINDOW).await;
            continue;
        }
        let idle = shared.left().await.is_ok_and(|left| left == 0);
        let compared = shared.prove_paced(idle).await;
        if shared.stopped() {
            return;
        }
        match compared {
            Ok(()) => {
                let unproven: u64 = shared.disks.iter().map(Mirrored::unproven).sum();
                let time: Duration =
                    shared.disks.iter().map(Mirrored::time_left).fold(Duration::ZERO, Duration::saturating_add);
                let little = unproven <= LITTLE * super::regions::REGION || time <= SHORT;
                shared.proven.store(little, Ordering::Release);
            }
            // The hypervisor meets the first, too, and both pass.
            Err(fault) if matches!(fault, MirrorFault::Compare(CopyError::Source { .. })) || fault.is_unreachable() => {
                tracing::warn!(error = chain(&fault), "the comparison waits and tries again");
            }
            Err(fault) => {
                *shared.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
            }
        }
        tokio::time::sleep(REST).await;
    }
}

impl Shared {
    /// Asks how every disk stands; an error holds the rehydration.
    async fn look(&self, paused: &mut u32) -> Result<Found, MirrorFault> {
        if let Some(fault) = self.fault.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(fault);
        }
        let (mut found, mut ready, mut waits) = (Found::Copying, true, false);
        for (slot, one) in self.disks.iter().enumerate().filter(|(_, one)| !one.moved) {
            let ended = |reason: &str| MirrorFault::Ended { disk: one.name.clone(), reason: reason.to_owned() };
            match self.vm.mirror_state(one.at).await {
                Ok(MirrorState::Copying(progress)) => {
                    if let Some(seen) = self.seen.lock().unwrap_or_else(PoisonError::into_inner).get_mut(slot) {
                        *seen = Some(progress);
                    }
                    ready &= progress.ready;
                    match progress.doing {
                        Copying::Running => {}
                        Copying::Paused if *paused >= PAUSED_LOOKS => {
                            return Err(ended("it was paused in the hypervisor"));
                        }
                        Copying::Paused => waits = true,
                        Copying::Stalled { side: Some(Side::Target), no_space } => return Err(one.full(no_space)),
                        // Where the side is not known it fails once more, and is.
                        Copying::Stalled { .. } => {
                            found = Found::Failing(MirrorFault::Source { disk: one.name.clone() }.to_string());
                        }
                    }
                }
                Ok(MirrorState::Failed { cause: Cause::Side(Side::Source), .. }) => {
                    ready = false;
                    found = Found::Failing(MirrorFault::Source { disk: one.name.clone() }.to_string());
                }
                Ok(MirrorState::Failed { cause: Cause::Unknown, reason }) => {
                    ready = false;
                    found = Found::Failing(ended(&reason).to_string());
                }
                Ok(MirrorState::Failed { cause: Cause::Side(Side::Target), reason }) => return Err(one.target(reason)),
                Ok(MirrorState::Failed { cause: Cause::Cancelled, reason }) => return Err(ended(&reason)),
                Ok(MirrorState::None) => return Err(ended("the hypervisor does not know of it")),
                Ok(MirrorState::Pivoted { .. }) => {}
                Err(MirrorError::Machine(MachineError::Gone { .. })) => return Err(ended("the VM has ended")),
                Err(error) => {
                    ready = false;
                    found = Found::Failing(format!("cannot see how disk {} stands: {}", one.name, chain(&error)));
                }
            }
        }
        *paused = if waits { *paused + 1 } else { 0 };
        self.ready.store(ready, Ordering::Release);
        Ok(match found {
            Found::Copying if ready => Found::AllReady,
            found => found,
        })
    }

    /// Lets the copies that wait go on, and begins those anew that have ended.
    async fn resume_stalled(&self) {
        let each = share(self.pace.rate(), self.disks.iter().filter(|one| !one.moved).count());
        for one in self.disks.iter().filter(|one| !one.moved) {
            if let Err(error) = one.copy(&*self.vm, each).await {
                tracing::warn!(disk = one.name, error = chain(&error), "cannot let a copy go on");
            }
        }
    }

    /// Shows how fast it goes, and copies as fast as the guest bears.
    async fn keep_pace(&self, kept: &mut Kept) {
        let (mut requests, mut nanos, mut changed) = (0, 0, 0);
        for (one, load) in self.disks.iter().zip(&mut kept.loads) {
            let Ok(now) = self.vm.disk_load(one.at).await else { continue };
            requests += now.requests.saturating_sub(load.requests);
            nanos += now.nanos.saturating_sub(load.nanos);
            changed += now.changed.saturating_sub(load.changed);
            *load = now;
        }
        let copied: u64 = {
            let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.iter().flatten().map(|progress| progress.copied).sum()
        };
        let seconds = kept.at.elapsed().as_secs_f64().max(0.001);
        kept.at = Instant::now();
        let Some(before) = kept.copied.replace(copied) else { return };
        let latency = nanos.checked_div(requests).map(Duration::from_nanos);
        self.pace.felt(latency);
        let blend = |old: f64, new: u64| old * 0.75 + new as f64 / seconds * 0.25;
        {
            let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
            progress.rate = blend(progress.rate, copied.saturating_sub(before));
            progress.dirty_rate = blend(progress.dirty_rate, changed);
            progress.latency_us = latency.map(|latency| u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
        }
        let each = {
            let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            share(self.pace.rate(), seen.iter().flatten().filter(|progress| !progress.ready).count())
        };
        if kept.each.replace(each) != Some(each) {
            for one in self.disks.iter().filter(|one| !one.moved) {
                if let Err(error) = self.vm.mirror_limit(one.at, each).await {
                    tracing::debug!(disk = one.name, error = chain(&error), "the copy keeps its pace");
                }
            }
        }
    }

    /// Bytes that the hypervisor still has to copy. An error if it does not copy all.
    async fn left(&self) -> Result<u64, MirrorFault> {
        let mut left = 0;
        for one in self.disks.iter().filter(|one| !one.moved) {
            match self.vm.mirror_state(one.at).await.map_err(|source| one.hypervisor(source))? {
                MirrorState::Copying(MirrorProgress { copied, total, ready: true, doing: Copying::Running }) => {
                    left += total.saturating_sub(copied);
                }
                MirrorState::Copying(MirrorProgress { ready: true, doing: Copying::Paused, .. }) => left += 1,
                MirrorState::Pivoted { .. } => {}
                MirrorState::Copying(MirrorProgress {
                    doing: Copying::Stalled { side: Some(Side::Target), no_space },
                    ..
                }) => return Err(one.full(no_space)),
                MirrorState::Copying(_) => {
                    return Err(MirrorFault::Ended { disk: one.name.clone(), reason: "it does not go on".to_owned() });
                }
                MirrorState::Failed { reason, .. } => {
                    return Err(MirrorFault::Ended { disk: one.name.clone(), reason });
                }
                MirrorState::None => return Err(one.hypervisor(MirrorError::NotMirrored { disk: one.at })),
            }
        }
        Ok(left)
    }

    /// Compares once what is not proven, at the pace of the copy. `idle`: nothing was left to copy when it began.
    async fn prove_paced(self: &Arc<Self>, idle: bool) -> Result<(), MirrorFault> {
        let pace = self.clone();
        self.pass(move |one| one.prove(&pace.pace, &pace.stop, idle)).await
    }

    /// The same without a limit.
    async fn prove(self: &Arc<Self>, hurry: &Hurry) -> Result<(), MirrorFault> {
        let hurry = hurry.0.clone();
        self.pass(move |one| one.prove(&hurry.0, &hurry.1, false)).await
    }

    async fn pass(
        self: &Arc<Self>,
        prove: impl Fn(&Mirrored) -> Result<(), CopyError> + Send + 'static,
    ) -> Result<(), MirrorFault> {
        for one in self.disks.iter().filter(|one| one.unproven() > 0) {
            one.settle(&*self.vm).await?;
        }
        let shared = self.clone();
        let all = move || shared.disks.iter().filter(|one| one.unproven() > 0).try_for_each(&prove);
        Ok(tokio::task::spawn_blocking(all).await.map_err(MirrorFault::Panicked)??)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn show(&self, phase: Phase) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).phase = phase;
    }
}

impl Watch for Shared {
    fn progress(&self) -> Progress {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn hydrated(&self, disk: usize) -> u64 {
        let Some(one) = self.disks.get(disk) else { return 0 };
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner).get(disk).copied().flatten();
        match seen {
            _ if one.moved => one.size,
            // Before it has counted what is to copy it says that nothing is.
            Some(progress) if progress.total > 0 => {
                one.size.saturating_sub(progress.total - progress.copied.min(progress.total))
            }
            _ => 0,
        }
    }
}
