//! The life of a recovery as a pure state machine.
//!
//! ```text
//!              Published+VmStarted           RehydrateRequested                FullyHydrated
//!  publishing --------------------> running -------------------> rehydrating ----------------> ready-for-cutover
//!      |                               ^                          |  ^   |                        |  ^  |
//!      | PublishFailed,                +---- RehydrationCancelled +  |   |       FellBehind       |  |  |
//!      | VmStartFailed,                |                             |   +<-----------------------+  |  |
//!      | Interrupted                   +-----------------------------|--- RehydrationCancelled ------+  |
//!      v                                                             | SwitchFailed                     | CutoverRequested
//!    failed                                                          +------------- cutting-over <------+
//!                                                                                        | Switched
//!  any but cutting-over and discarded: DiscardRequested -> discarding -> discarded       v
//!                                                                                     cut-over
//! ```
//!
//! | state | overlay | exports | VM | after a restart of Lifeboat |
//! | --- | --- | --- | --- | --- |
//! | publishing | maybe | maybe | maybe starting | a living VM is taken over (running), else failed |
//! | running | yes | yes | runs, or has shut itself down | exports served again, VM adopted |
//! | rehydrating | yes | yes | the same | the same, and the copying goes on |
//! | ready-for-cutover | yes | yes | the same | the same |
//! | cutting-over | yes | yes | held for a moment | rehydrating, the VM is let go on |
//! | cut-over | no | of production storage, while the VM needs them | runs, or has shut itself down | the same, after what was left to do |
//! | failed | yes | no | no | kept as it is until discarded |
//! | discarding | maybe | no | being stopped | the discard is finished |
//! | discarded | no | no | no | the folder is removed |
//!
//! The driver journals the new state before it performs the actions, and every action may run twice. Only of
//! cutting-over and cut-over the order is the other way round: see docs/design/rehydration.md.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where a recovery stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Overlays and exports are being made, then the VM is started.
    Publishing,
    /// The exports serve; the VM, if one was asked for, was started.
    Running,
    /// What the guest sees is being copied to production storage.
    Rehydrating,
    /// All of it is there, and what the guest writes is copied as it comes.
    ReadyForCutover,
    /// The guest is being moved onto production storage.
    CuttingOver,
    /// The guest is on production storage.
    CutOver,
    /// It did not come up; what exists is kept until it is discarded.
    Failed,
    /// Being taken away.
    Discarding,
    /// Nothing is left.
    Discarded,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            State::Publishing => "publishing",
            State::Running => "running",
            State::Rehydrating => "rehydrating",
            State::ReadyForCutover => "ready-for-cutover",
            State::CuttingOver => "cutting-over",
            State::CutOver => "cut-over",
            State::Failed => "failed",
            State::Discarding => "discarding",
            State::Discarded => "discarded",
        })
    }
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The exports serve.
    Published,
    /// They could not be made.
    PublishFailed,
    /// The VM runs, or none was asked for.
    VmStarted,
    /// The VM did not start.
    VmStartFailed,
    /// Lifeboat was restarted and the VM it was starting does not live.
    Interrupted,
    /// Somebody wants it on production storage.
    RehydrateRequested,
    /// Somebody wants it to stay on its overlay.
    RehydrationCancelled,
    /// Everything is copied and proven.
    FullyHydrated,
    /// The copying does not keep up with the guest, or failed after all was copied.
    FellBehind,
    /// Somebody wants the guest moved onto the copy.
    CutoverRequested,
    /// The guest is on the copy.
    Switched,
    /// It is still on its overlay.
    SwitchFailed,
    /// Somebody wants it gone.
    DiscardRequested,
    /// VM, exports and overlays are gone.
    Removed,
}

/// What the driver has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start the VM on the exports.
    StartVm,
    /// Stop the VM, if it lives.
    StopVm,
    /// Copy what the guest sees to production storage, and go on as it writes.
    Copy,
    /// Stop copying.
    StopCopying,
    /// Move the guest onto the copy.
    Switch,
    /// Remove the overlays.
    RemoveOverlays,
    /// Take the exports away.
    Retire,
    /// Remove the overlays and everything else the recovery keeps.
    Remove,
    /// Tell the asker that this cannot be done in this state.
    Refuse,
}

impl State {
    /// Whether the guest runs from its overlay.
    pub fn runs(self) -> bool {
        match self {
            State::Running | State::Rehydrating | State::ReadyForCutover | State::CuttingOver => true,
            State::Publishing | State::CutOver | State::Failed | State::Discarding | State::Discarded => false,
        }
    }

    /// Whether the disks are on their way to production storage, or there.
    pub fn moves(self) -> bool {
        match self {
            State::Rehydrating | State::ReadyForCutover | State::CuttingOver | State::CutOver => true,
            State::Publishing | State::Running | State::Failed | State::Discarding | State::Discarded => false,
        }
    }

    /// Whether what the guest has written can be made a recovery point now.
    pub fn commits(self) -> bool {
        match self {
            State::Running | State::Rehydrating | State::ReadyForCutover => true,
            State::CuttingOver | State::CutOver => false,
            State::Publishing | State::Failed | State::Discarding | State::Discarded => false,
        }
    }

    /// What a user can do next with the recovery, as commands.
    pub fn next_steps(self) -> &'static [&'static str] {
        match self {
            State::Running => &["rehydrate", "commit", "discard"],
            State::Rehydrating => {
                &["rehydrate --pause", "rehydrate --resume", "rehydrate --cancel", "commit", "discard"]
            }
            State::ReadyForCutover => &["cutover", "rehydrate --cancel", "commit", "discard"],
            State::CutOver | State::Failed => &["discard"],
            State::Publishing | State::CuttingOver | State::Discarding | State::Discarded => &[],
        }
    }

    /// The state after `event` and what to do on entering it. No I/O, no clock, no lock.
    pub fn apply(self, event: Event) -> (State, Vec<Action>) {
        match (self, event) {
            (State::Publishing, Event::Published) => (State::Publishing, vec![Action::StartVm]),
            (State::Publishing, Event::VmStarted) => (State::Running, vec![]),
            (State::Publishing, Event::PublishFailed | Event::VmStartFailed | Event::Interrupted) => {
                (State::Failed, vec![Action::StopVm, Action::Retire])
            }
            (State::Running, Event::RehydrateRequested) => (State::Rehydrating, vec![Action::Copy]),
            (State::Rehydrating, Event::FullyHydrated) => (State::ReadyForCutover, vec![]),
            (State::ReadyForCutover, Event::FellBehind) => (State::Rehydrating, vec![]),
            (State::Rehydrating | State::ReadyForCutover, Event::RehydrationCancelled) => {
                (State::Running, vec![Action::StopCopying])
            }
            (State::ReadyForCutover, Event::CutoverRequested) => (State::CuttingOver, vec![Action::Switch]),
            (State::CuttingOver, Event::SwitchFailed) => (State::Rehydrating, vec![Action::Copy]),
            (State::CuttingOver, Event::Switched) => (State::CutOver, vec![Action::RemoveOverlays]),
            (
                State::Publishing
                | State::Running
                | State::Rehydrating
                | State::ReadyForCutover
                | State::CutOver
                | State::Failed
                | State::Discarding,
                Event::DiscardRequested,
            ) => (State::Discarding, vec![Action::StopCopying, Action::StopVm, Action::Retire, Action::Remove]),
            (State::Discarding, Event::Removed) => (State::Discarded, vec![]),
            (state, _) => (state, vec![Action::Refuse]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 9] = [
        State::Publishing,
        State::Running,
        State::Rehydrating,
        State::ReadyForCutover,
        State::CuttingOver,
        State::CutOver,
        State::Failed,
        State::Discarding,
        State::Discarded,
    ];
    const EVENTS: [Event; 14] = [
        Event::Published,
        Event::PublishFailed,
        Event::VmStarted,
        Event::VmStartFailed,
        Event::Interrupted,
        Event::RehydrateRequested,
        Event::RehydrationCancelled,
        Event::FullyHydrated,
        Event::FellBehind,
        Event::CutoverRequested,
        Event::Switched,
        Event::SwitchFailed,
        Event::DiscardRequested,
        Event::Removed,
    ];

    #[test]
    fn the_vm_starts_only_after_the_exports_serve() {
        let (state, actions) = State::Publishing.apply(Event::Published);
        assert_eq!((state, actions), (State::Publishing, vec![Action::StartVm]));
        assert_eq!(state.apply(Event::VmStarted), (State::Running, vec![]));
    }

    #[test]
    fn the_vm_is_stopped_before_its_exports_go_and_they_before_its_overlay() {
        for state in STATES {
            let (next, actions) = state.apply(Event::DiscardRequested);
            if !matches!(state, State::CuttingOver | State::Discarded) {
                let order = vec![Action::StopCopying, Action::StopVm, Action::Retire, Action::Remove];
                assert_eq!((next, actions), (State::Discarding, order), "{state}");
            }
        }
    }

    #[test]
    fn only_a_discard_stops_a_vm_that_runs() {
        for state in STATES.into_iter().filter(|state| *state != State::Publishing) {
            for event in EVENTS.into_iter().filter(|event| *event != Event::DiscardRequested) {
                assert!(!state.apply(event).1.contains(&Action::StopVm), "{state} {event:?}");
            }
        }
    }

    #[test]
    fn an_overlay_goes_only_by_a_discard_or_once_the_guest_is_on_the_copy() {
        for state in STATES {
            for event in EVENTS {
                let (_, actions) = state.apply(event);
                let goes = actions.contains(&Action::Remove) || actions.contains(&Action::RemoveOverlays);
                let may = event == Event::DiscardRequested || (state, event) == (State::CuttingOver, Event::Switched);
                assert!(!goes || may, "{state} {event:?}");
            }
        }
    }

    #[test]
    fn a_commit_is_offered_where_it_can_be_made() {
        for state in STATES {
            assert_eq!(state.next_steps().contains(&"commit"), state.commits(), "{state}");
            assert!(!state.commits() || state.runs(), "{state}: there is no overlay to commit");
        }
    }

    #[test]
    fn a_second_cutover_is_refused() {
        let (state, actions) = State::ReadyForCutover.apply(Event::CutoverRequested);
        assert_eq!(actions, vec![Action::Switch]);
        assert_eq!(state.apply(Event::CutoverRequested).1, vec![Action::Refuse]);
        assert_eq!(State::CutOver.apply(Event::CutoverRequested).1, vec![Action::Refuse]);
    }

    #[test]
    fn a_refused_event_changes_nothing() {
        for state in STATES {
            for event in EVENTS {
                let (next, actions) = state.apply(event);
                if actions.contains(&Action::Refuse) {
                    assert_eq!(next, state, "{event:?}");
                    assert_eq!(actions.len(), 1);
                }
            }
        }
    }
}
