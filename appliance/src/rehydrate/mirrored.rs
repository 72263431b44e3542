//! [`Mirrored`]: a disk that QEMU copies, and the proof that what it wrote is what the guest sees.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hypervisor::{DiskSource, Machine, MirrorError, MirrorState};

use super::compare::{self, Pair, Pass};
use super::copier::CopyError;
use super::live::LiveDisk;
use super::pace::Pace;
use super::regions::{REGION, Regions};
use super::target::{Place, Readback};

/// A region that differs in this many passes in a row, although nobody wrote to it and all was copied, is wrong.
const DIFFERENCES: u64 = 5;

/// A disk on its way.
#[derive(Debug)]
pub struct Mirrored {
    /// Its place in the machine.
    pub at: usize,
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// What the guest sees.
    pub disk: Arc<LiveDisk>,
    /// Where it moves to.
    pub place: Place,
    /// The same, as the hypervisor names it.
    pub source: DiskSource,
    /// The same, open beside the hypervisor.
    pub target: Arc<dyn Readback>,
    /// What is proven. `open` here is what the guest has written since the last pass: copying it is up to the hypervisor.
    pub regions: Arc<Regions>,
    /// The guest is on the target already.
    pub moved: bool,
    /// Bytes compared, and the nanoseconds it took.
    pub compared: AtomicU64,
    /// See `compared`.
    pub busy: AtomicU64,
    /// Regions that differed although nobody had written to them, and in how many passes in a row.
    pub suspects: Mutex<HashMap<u64, u64>>,
}

/// Why a mirror does not go on.
#[derive(Debug, thiserror::Error)]
pub enum MirrorFault {
    /// The hypervisor does not do its part.
    #[error("disk {disk}")]
    Hypervisor {
        /// Which disk.
        disk: String,
        /// Why.
        source: MirrorError,
    },
    /// The copy has ended by itself.
    #[error("the copy of disk {disk} has ended: {reason}")]
    Ended {
        /// Which disk.
        disk: String,
        /// In the hypervisor's words.
        reason: String,
    },
    /// The target does not take what is written.
    #[error("cannot write {target}: {reason}")]
    Target {
        /// Which.
        target: Place,
        /// What is wrong with it.
        reason: String,
    },
    /// The disk cannot be read.
    #[error("cannot read disk {disk}")]
    Source {
        /// Which disk.
        disk: String,
    },
    /// The comparison.
    #[error(transparent)]
    Compare(#[from] CopyError),
    /// The target cannot be made durable or looked at.
    #[error("cannot sync {target}")]
    Sync {
        /// Which.
        target: Place,
        /// Why.
        source: io::Error,
    },
    /// The guest was held as long as it may be.
    #[error(
        "{left} bytes of disk {disk} were still to be copied or compared when the guest had been held for {held:?}"
    )]
    Slow {
        /// Which disk.
        disk: String,
        /// Copied, but not compared, or not copied.
        left: u64,
        /// How long it was held.
        held: Duration,
    },
    /// What compares has ended.
    #[error("the comparison ended badly")]
    Panicked(#[source] tokio::task::JoinError),
}

impl MirrorFault {
    /// Whether the hypervisor could not be asked at the moment; it may copy on meanwhile.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, MirrorFault::Hypervisor { source, .. } if source.is_unreachable())
    }
}

impl Mirrored {
    /// Has the disk copied: on from where its copy waits, or anew.
    pub async fn copy(&self, vm: &dyn Machine, limit: Option<u64>) -> Result<(), MirrorError> {
        match vm.mirror_state(self.at).await? {
            MirrorState::None | MirrorState::Failed { .. } => {
                // What was proven may be overwritten by what it begins with.
                (0..self.regions.total()).for_each(|region| self.regions.unprove(region));
                vm.mirror(self.at, &self.source, limit).await
            }
            MirrorState::Copying(_) => {
                vm.mirror_limit(self.at, limit).await?;
                vm.mirror_resume(self.at).await
            }
            MirrorState::Pivoted { .. } => Ok(()),
        }
    }

    /// The target does not take what is written.
    pub fn target(&self, reason: String) -> MirrorFault {
        MirrorFault::Target { target: self.place.clone(), reason }
    }

    /// The same, where the hypervisor only says whether there was no space.
    pub fn full(&self, no_space: bool) -> MirrorFault {
        self.target(if no_space { "No space left on device" } else { "Input/output error" }.to_owned())
    }

    /// With what the hypervisor says.
    pub fn hypervisor(&self, source: MirrorError) -> MirrorFault {
        MirrorFault::Hypervisor { disk: self.name.clone(), source }
    }

    /// Bytes that are not proven.
    pub fn unproven(&self) -> u64 {
        if self.moved { 0 } else { self.regions.unproven() * REGION }
    }

    /// How long it would take to compare them without a limit; as good as for ever while nothing was compared.
    pub fn time_left(&self) -> Duration {
        let nanos = u128::from(self.busy.load(Ordering::Relaxed)) * u128::from(self.unproven());
        let each = nanos.checked_div(u128::from(self.compared.load(Ordering::Relaxed)));
        Duration::from_nanos(each.and_then(|nanos| u64::try_from(nanos).ok()).unwrap_or(u64::MAX))
    }

    /// Has all that the hypervisor has written so far made durable, and visible to `target`.
    ///
    /// Order: (1) this process syncs, (2) the hypervisor flushes, where it keeps something back, (3) the target is looked
    /// at anew. 2 alone would do, but the hypervisor stands still meanwhile, and its guest with it: so most is done in 1.
    pub async fn settle(&self, vm: &dyn Machine) -> Result<(), MirrorFault> {
        let blocking = |work: fn(&dyn Readback) -> io::Result<()>| {
            let (target, place) = (self.target.clone(), self.place.clone());
            async move {
                let done = tokio::task::spawn_blocking(move || work(&*target)).await.map_err(MirrorFault::Panicked)?;
                done.map_err(|source| MirrorFault::Sync { target: place, source })
            }
        };
        blocking(|target| target.sync()).await?;
        match self.place {
            Place::Raw(_) => {}
            Place::Qcow2(_) | Place::Nbd(_) => {
                vm.mirror_flush(self.at).await.map_err(|source| self.hypervisor(source))?;
            }
        }
        blocking(|target| target.refresh()).await
    }

    /// Compares once what is not proven. `idle`: the hypervisor has nothing left to copy. Blocks.
    pub fn prove(&self, pace: &Pace, stop: &AtomicBool, idle: bool) -> Result<(), CopyError> {
        let mut suspects = std::mem::take(&mut *self.suspects.lock().unwrap_or_else(PoisonError::into_inner));
        // What the guest wrote before this moment is compared in this pass, what it writes later in the next.
        while let Some(region) = self.regions.take_open(0) {
            suspects.remove(&region);
        }
        let pair = Pair { name: &self.name, disk: &self.disk, place: &self.place, target: &*self.target };
        let wrong = Mutex::new(HashMap::new());
        compare::over(&self.regions, Pass::Prove, pace, stop, |run, buffer| {
            let began = Instant::now();
            let (offset, length) = run.bytes(self.size);
            let found = pair.difference(offset, length, buffer)?;
            let nanos = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.busy.fetch_add(nanos, Ordering::Relaxed);
            self.compared.fetch_add(length, Ordering::Relaxed);
            let Some(found) = found else { return Ok(()) };
            let region = found / REGION;
            if !self.regions.is_open(region) {
                let times = suspects.get(&region).copied().unwrap_or(0) + 1;
                if idle && times >= DIFFERENCES {
                    return Err(CopyError::Differs { target: self.place.clone(), offset: found });
                }
                // Mostly the hypervisor has not got to it yet.
                wrong.lock().unwrap_or_else(PoisonError::into_inner).insert(region, times);
            }
            run.regions().for_each(|region| self.regions.unprove(region));
            Ok(())
        })?;
        let wrong = wrong.into_inner().unwrap_or_else(PoisonError::into_inner);
        *self.suspects.lock().unwrap_or_else(PoisonError::into_inner) = wrong;
        Ok(())
    }
}
