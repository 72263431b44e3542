//! All recoveries of a state folder.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use blockstore::overlay::Overlay;
use nbd_server::ExportTable;

use super::commit::{Commit, Wish};
use super::moving::Order;
use super::one::{Context, Definition, Recovery};
use super::schedule::{Schedule, ScheduleRequest};
use super::state::State;
use super::{RecoverRequest, RecoveryView};
use crate::admission::{self, Admission, Ask, Capacity, Grant, Holder, Terms};
use crate::catalog::PointSummary;
use crate::disks;
use crate::hardware::Hardware;
use crate::problem::{Kind, Problem};
use crate::rehydrate::RehydrateRequest;

/// How long to wait before a recovery that cannot be served is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// The recoveries of this process's state folder.
#[derive(Debug)]
pub struct Recoveries {
    context: Arc<Context>,
    known: Mutex<Known>,
    admission: Arc<Admission>,
}

/// A request that says all of its machine.
#[derive(Debug)]
pub struct Prepared {
    request: RecoverRequest,
    warnings: Vec<String>,
}

impl Prepared {
    /// The request, and what is odd about it.
    pub fn into_parts(self) -> (RecoverRequest, Vec<String>) {
        (self.request, self.warnings)
    }
}

#[derive(Debug, Default)]
struct Known {
    recoveries: BTreeMap<String, Arc<Recovery>>,
    /// Recoveries whose journal cannot be read, and why.
    broken: BTreeMap<String, Problem>,
}

impl Recoveries {
    /// No recovery is known until [`Recoveries::take_up`].
    pub fn new(context: Context) -> Recoveries {
        Recoveries { context: Arc::new(context), known: Mutex::default(), admission: Arc::default() }
    }

    /// Takes up every recovery of the state folder: exports are served again and VMs adopted. One that cannot be is
    /// tried again until it can.
    pub async fn take_up(&self) {
        for name in self.context.state.recovery_names() {
            let recovery = match Recovery::load(self.context.clone(), &name) {
                Ok(Some(recovery)) => recovery,
                Ok(None) => continue,
                Err(problem) => {
                    tracing::error!(recovery = %name, %problem, "recovery not taken up");
                    self.lock().broken.insert(name, problem);
                    continue;
                }
            };
            self.lock().recoveries.insert(name.clone(), recovery.clone());
            if let Err(problem) = recovery.take_up().await {
                tracing::error!(recovery = %name, %problem, "recovery not taken up yet; trying again");
                recovery.note_problem(&problem);
                tokio::spawn(retry(recovery));
            }
        }
        self.lock().recoveries.retain(|_, recovery| recovery.view().state != State::Discarded);
    }

    /// What this host carries, and could carry.
    pub fn capacity(&self) -> Result<Capacity, Problem> {
        let (granted, waiting) = self.admission.known();
        self.add_up(granted, waiting)
    }

    fn add_up(&self, granted: Vec<Holder>, waiting: Vec<Holder>) -> Result<Capacity, Problem> {
        let host = admission::host::read(self.context.state.root())?;
        let mut holders: Vec<Holder> =
            self.lock().recoveries.values().filter_map(|recovery| recovery.holds()).collect();
        // Between its start and the end of its request a VM is known twice.
        let new = granted.into_iter().filter(|new| holders.iter().all(|holder| holder.name != new.name));
        let new: Vec<Holder> = new.collect();
        holders.extend(new);
        Ok(Capacity::new(host, holders, waiting))
    }

    /// What the machine of `point` is made of where `request` does not say it, and what is odd about that. Reads the
    /// repository.
    pub fn complete(&self, point: &PointSummary, request: RecoverRequest) -> Result<Prepared, Problem> {
        let told = disks::load_point(&self.context.repository, &point.id)?;
        let (known, warnings) = match Hardware::read(&told.hardware) {
            Ok(known) => (known, Vec::new()),
            Err(why) => (Hardware::default(), vec![format!("{why}; going by the command line and defaults")]),
        };
        Ok(Prepared { request: RecoverRequest { hardware: request.hardware.over(known), ..request }, warnings })
    }

    /// Keeps room on the host for a recovery of `point`, or waits for it, as `terms` say. Dropped, it no longer waits.
    pub async fn admit(&self, point: &PointSummary, prepared: &Prepared, terms: Terms) -> Result<Grant, Problem> {
        let request = &prepared.request;
        let name = request.name.as_deref().unwrap_or(&point.machine);
        crate::capture::check_name("recovery", name)?;
        super::machine::check(request, &point.disks)?;
        request.commits.as_ref().map_or(Ok(()), Schedule::check)?;
        self.refuse_known(&self.lock(), name)?;
        self.admission.admit(name, request.ask(), terms, |granted, waiting| self.add_up(granted, waiting)).await
    }

    /// Room on the host for a drill, if there is some that no recovery waits for; kept until the grant is dropped.
    pub fn room_for_drill(&self, name: &str, ask: Ask) -> Result<Option<Grant>, Problem> {
        self.admission.offer(name, ask, |granted, waiting| self.add_up(granted, waiting))
    }

    fn refuse_known(&self, known: &Known, name: &str) -> Result<(), Problem> {
        if let Some(there) = known.recoveries.get(name) {
            return Err(Problem::refused(format!("recovery {name} exists already and is {}", there.view().state))
                .hint(format!("give another --name, or end it with `lifeboat discard {name}`")));
        }
        known.broken.get(name).map_or(Ok(()), |problem| Err(problem.clone()))
    }

    /// Starts a recovery of `point`, for which room is kept.
    ///
    /// One that does not come up is taken away again before the failure is returned, unless it was not new.
    pub async fn start(&self, point: &PointSummary, prepared: Prepared, grant: Grant) -> Result<RecoveryView, Problem> {
        let Prepared { mut request, mut warnings } = prepared;
        let name = request.name.clone().unwrap_or_else(|| point.machine.clone());
        crate::capture::check_name("recovery", &name)?;
        super::machine::check(&request, &point.disks)?;
        super::domain::prepare(&name, &mut request).await?;
        let definition = Definition {
            name: name.clone(),
            point: point.id.clone(),
            machine: point.machine.clone(),
            disks: point.disks.clone(),
            request,
        };
        let recovery = {
            let mut known = self.lock();
            self.refuse_known(&known, &name)?;
            let recovery = Recovery::create(self.context.clone(), definition)?;
            known.recoveries.insert(name.clone(), recovery.clone());
            recovery
        };
        recovery.tell();
        match recovery.bring_up().await {
            Ok(()) => {
                let view = recovery.view();
                warnings.extend(grant.warnings.iter().chain(&view.warnings).cloned());
                Ok(RecoveryView { warnings, ..view })
            }
            Err(problem) => {
                match recovery.discard().await {
                    Ok(()) => {
                        self.lock().recoveries.remove(&name);
                    }
                    Err(second) => tracing::error!(recovery = %name, problem = %second, "left behind after a failure"),
                }
                Err(problem)
            }
        }
    }

    /// All recoveries, by name; those whose journal cannot be read are listed as failed.
    pub fn list(&self) -> Vec<RecoveryView> {
        let known = self.lock();
        let whole = known.recoveries.values().map(|recovery| recovery.view());
        let broken = known.broken.iter().map(|(name, problem)| super::broken::view(name, problem));
        let mut all: Vec<RecoveryView> = whole.chain(broken).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// The exports of every recovery that is served, by its name.
    pub fn tables(&self) -> Vec<(String, Arc<ExportTable>)> {
        let known = self.lock();
        known.recoveries.iter().filter_map(|(name, recovery)| Some((name.clone(), recovery.table()?))).collect()
    }

    /// Keeps room on the host for the VM of a recovery that has ended, or waits for it, as `terms` say. Dropped, it no
    /// longer waits. A VM that runs needs none.
    pub async fn admit_again(&self, name: &str, terms: Terms) -> Result<Option<Grant>, Problem> {
        let recovery = self.get(name)?;
        if recovery.holds().is_some() {
            return Ok(None);
        }
        let capacity = |granted, waiting| self.add_up(granted, waiting);
        self.admission.admit(name, recovery.ask(), terms, capacity).await.map(Some)
    }

    /// Starts the VM of a recovery again after it has ended.
    pub async fn start_vm(&self, name: &str, grant: Option<Grant>) -> Result<RecoveryView, Problem> {
        let recovery = self.get(name)?;
        recovery.start_again().await?;
        let warnings = grant.map_or(Vec::new(), |grant| grant.warnings.clone());
        Ok(RecoveryView { warnings, ..recovery.view() })
    }

    /// One recovery.
    pub fn view(&self, name: &str) -> Result<RecoveryView, Problem> {
        if let Some(problem) = self.lock().broken.get(name) {
            return Ok(super::broken::view(name, problem));
        }
        self.get(name).map(|recovery| recovery.view())
    }

    /// The disks of a recovery as they are at present, by name; none while they are not served.
    pub fn disks(&self, name: &str) -> Result<Vec<(String, Arc<Overlay>)>, Problem> {
        self.get(name).map(|recovery| recovery.disks())
    }

    /// Begins to move a recovery's disks to production storage.
    pub async fn rehydrate(&self, name: &str, request: &RehydrateRequest) -> Result<RecoveryView, Problem> {
        let recovery = self.get(name)?;
        recovery.rehydrate(request).await?;
        Ok(recovery.view())
    }

    /// Pauses, resumes or cancels that.
    pub async fn steer(&self, name: &str, order: Order) -> Result<RecoveryView, Problem> {
        let recovery = self.get(name)?;
        recovery.steer(order).await?;
        Ok(recovery.view())
    }

    /// Moves the guest onto production storage.
    pub async fn cut_over(&self, name: &str) -> Result<RecoveryView, Problem> {
        let recovery = self.get(name)?;
        recovery.cut_over().await?;
        Ok(recovery.view())
    }

    /// Freezes a recovery's disks at one instant, to be made a recovery point by [`Commit::run`].
    pub async fn commit(&self, name: &str, wish: Wish) -> Result<Commit, Problem> {
        self.get(name)?.freeze(wish).await
    }

    /// Has a recovery committed every so often from now on, or no more.
    pub async fn schedule(&self, name: &str, request: ScheduleRequest) -> Result<RecoveryView, Problem> {
        request.schedule.as_ref().map_or(Ok(()), Schedule::check)?;
        let recovery = self.get(name)?;
        recovery.set_schedule(request.schedule).await?;
        Ok(recovery.view())
    }

    /// Ends a recovery: VM, exports, overlays and sockets go. One that waits for memory has none of them yet.
    pub async fn discard(&self, name: &str) -> Result<RecoveryView, Problem> {
        let waited = self.admission.end(name);
        let ended = match self.discard_begun(name).await {
            Err(problem) if waited && problem.kind == Kind::NotFound => {
                Ok(RecoveryView { state: State::Discarded, problem: None, ..super::broken::view(name, &problem) })
            }
            ended => ended,
        };
        self.admission.look_again();
        ended
    }

    async fn discard_begun(&self, name: &str) -> Result<RecoveryView, Problem> {
        let broken = self.lock().broken.get(name).cloned();
        if let Some(problem) = broken {
            super::broken::discard(&self.context, name, self.libvirts()).await?;
            self.lock().broken.remove(name);
            return Ok(RecoveryView { state: State::Discarded, ..super::broken::view(name, &problem) });
        }
        let recovery = self.get(name)?;
        recovery.discard().await?;
        self.lock().recoveries.remove(name);
        Ok(recovery.view())
    }

    /// Where recoveries have their domains.
    fn libvirts(&self) -> BTreeSet<String> {
        self.lock().recoveries.values().filter_map(|recovery| recovery.libvirt().map(str::to_owned)).collect()
    }

    /// Whether any recovery needs this process, or its successor, to serve it.
    pub fn any_live(&self) -> bool {
        let waits = !self.admission.known().1.is_empty();
        waits || self.lock().recoveries.values().any(|recovery| is_live(recovery.view().state))
    }

    /// Stops serving everything, for the next process to take up.
    pub async fn leave(&self) {
        let all: Vec<_> = self.lock().recoveries.values().cloned().collect();
        for recovery in all {
            recovery.leave().await;
        }
    }

    fn get(&self, name: &str) -> Result<Arc<Recovery>, Problem> {
        let known = self.lock();
        if let Some(problem) = known.broken.get(name) {
            return Err(problem.clone());
        }
        known.recoveries.get(name).cloned().ok_or_else(|| {
            if self.admission.waits(name) {
                return Problem::not_found(format!("recovery {name} waits for memory and has not begun"))
                    .hint(format!("`lifeboat status` shows who waits; `lifeboat discard {name}` ends the wait"));
            }
            Problem::not_found(format!("there is no recovery `{name}`")).hint("`lifeboat recoveries` lists them")
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_live(state: State) -> bool {
    match state {
        State::Publishing | State::Discarding => true,
        State::Running | State::Rehydrating | State::ReadyForCutover | State::CuttingOver | State::CutOver => true,
        State::Failed | State::Discarded => false,
    }
}

async fn retry(recovery: Arc<Recovery>) {
    loop {
        tokio::time::sleep(RETRY).await;
        match recovery.take_up().await {
            Ok(()) => return,
            Err(problem) => recovery.note_problem(&problem),
        }
    }
}
