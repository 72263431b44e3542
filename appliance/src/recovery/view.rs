//! What the API shows of a recovery.

use blockstore::overlay::Room;

use super::machine::{self, VNC_SOCKET};
use super::one::{Recovery, Shown};
use super::state::State;
use super::{DiskView, HypervisorKind, RecoveryView, RehydrationView};
use crate::catalog::DiskSummary;
use crate::disks;
use crate::rehydrate::{Phase, Progress};
use crate::statistics::Served;

impl Recovery {
    /// What the API shows.
    pub fn view(&self) -> RecoveryView {
        let shown = self.lock();
        let on = &self.definition.request.on;
        let qemu = *on == HypervisorKind::Qemu;
        let here = *on != HypervisorKind::None && self.definition.request.serve_on.is_none();
        let path = |name: &str| here.then(|| self.dir.join(name).display().to_string());
        let socket = |name: &str| qemu.then(|| self.socket(name).display().to_string());
        let planned = |at: usize| shown.plan.as_ref().and_then(|plan| plan.disks.get(at));
        let disk = |(at, disk): (usize, &DiskSummary)| {
            let live = shown.disks.get(at).and_then(|disk| disk.overlay());
            let overlay = live.as_ref().map(|export| &export.overlay);
            let space = overlay.and_then(|overlay| overlay.space());
            DiskView {
                name: disk.name.clone(),
                nbd_uri: shown.uris.get(at).cloned(),
                size: disk.size,
                hydrated: match shown.state {
                    State::CutOver => disk.size,
                    _ => shown.moving.as_ref().map_or(0, |moving| moving.hydrated(at)),
                },
                target: planned(at).map(|planned| planned.place.to_string()),
                overlay: overlay.map_or(0, |overlay| overlay.usage().data_grains * 4096),
                free: space.map(|space| space.free),
                space_short: space.is_some_and(|space| space.room != Room::Enough),
                served: served(&shown, &disk.name),
            }
        };
        // Looked at once: what is held has its reason beside it.
        let progress = shown.moving.as_ref().map(|moving| moving.progress());
        let mut timings = shown.timings;
        timings.first_read_ms = self.first_read.millis();
        RecoveryView {
            name: self.definition.name.clone(),
            point: self.definition.point.clone(),
            machine: self.definition.machine.clone(),
            state: shown.state,
            problem: shown.problem.clone().or_else(|| held(progress.as_ref()?)),
            hypervisor: on.clone(),
            domain: shown.domain.clone(),
            accelerator: shown.accelerator.clone(),
            vm: shown.vm.clone(),
            pid: shown.pid,
            console: path("console.log"),
            qmp: socket("qmp.sock"),
            guest_agent: socket("guest-agent.sock"),
            display: qemu.then(|| machine::display_uri(&self.definition.request, &self.socket(VNC_SOCKET))).flatten(),
            disks: self.definition.disks.iter().enumerate().map(disk).collect(),
            rehydration: rehydration(&shown, progress.as_ref(), &self.definition.disks),
            commits: shown.commits.view(),
            next: shown.state.next_steps().iter().map(|step| (*step).to_owned()).collect(),
            timings,
            warnings: shown.changes.clone(),
        }
    }
}

fn served(shown: &Shown, disk: &str) -> Option<Served> {
    Served::of(shown.table.as_ref()?, &disks::export_name(disk).ok()?)
}

/// Why nothing is copied, before whoever watches has noted it.
fn held(progress: &Progress) -> Option<String> {
    match &progress.phase {
        Phase::Held(why) => Some(why.clone()),
        Phase::Copying | Phase::Comparing | Phase::Ready | Phase::Retrying(_) => None,
    }
}

/// What is shown of a rehydration.
fn rehydration(shown: &Shown, progress: Option<&Progress>, disks: &[DiskSummary]) -> Option<RehydrationView> {
    let plan = shown.plan.as_ref()?;
    if shown.state == State::CutOver {
        return None;
    }
    let mut view = RehydrationView {
        mode: plan.mode,
        phase: "held".to_owned(),
        limit: plan.limit,
        rate: 0,
        left: 0,
        seconds_left: None,
        dirty_rate: 0,
        latency_us: None,
    };
    let (Some(moving), Some(progress)) = (&shown.moving, progress) else { return Some(view) };
    view.left = disks.iter().enumerate().map(|(at, disk)| disk.size.saturating_sub(moving.hydrated(at))).sum();
    view.phase = match progress.phase {
        Phase::Copying => "copying",
        Phase::Comparing => "comparing",
        Phase::Ready => "ready",
        Phase::Retrying(_) => "retrying",
        Phase::Held(_) => "held",
    }
    .to_owned();
    // A rate is shown in whole bytes; it is never negative, and saturates.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate of bytes, shown")]
    let whole = |rate: f64| rate.max(0.0) as u64;
    view.rate = whole(progress.rate);
    view.dirty_rate = whole(progress.dirty_rate);
    view.latency_us = progress.latency_us;
    view.seconds_left = view.left.checked_div(view.rate).filter(|_| view.phase == "copying");
    Some(view)
}
