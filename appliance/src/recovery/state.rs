//! The life of a recovery as a pure state machine.
//!
//! ```text
//!             Published+VmStarted              DiscardRequested
//! publishing ---------------------> running ---------------------> discarding --> discarded
//!     |                                                                ^
//!     | PublishFailed, VmStartFailed, Interrupted                      | DiscardRequested
//!     +--------------------------------> failed ----------------------+
//! ```
//!
//! | state | overlay | exports | VM | after a restart of Lifeboat |
//! | --- | --- | --- | --- | --- |
//! | publishing | maybe | maybe | maybe starting | a living VM is taken over (running), else failed |
//! | running | yes | yes | runs, or has shut itself down | exports served again, VM adopted |
//! | failed | yes | no | no | kept as it is until discarded |
//! | discarding | maybe | no | being stopped | the discard is finished |
//! | discarded | no | no | no | the folder is removed |
//!
//! The driver journals the new state before it performs the actions, and every action may run twice.

use serde::{Deserialize, Serialize};

/// Where a recovery stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Overlays and exports are being made, then the VM is started.
    Publishing,
    /// The exports serve; the VM, if one was asked for, was started.
    Running,
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
    /// Take the exports away.
    Retire,
    /// Remove the overlays and everything else the recovery keeps.
    Remove,
    /// Tell the asker that this cannot be done in this state.
    Refuse,
}

impl State {
    /// The state after `event` and what to do on entering it. No I/O, no clock, no lock.
    pub fn apply(self, event: Event) -> (State, Vec<Action>) {
        match (self, event) {
            (State::Publishing, Event::Published) => (State::Publishing, vec![Action::StartVm]),
            (State::Publishing, Event::VmStarted) => (State::Running, vec![]),
            (State::Publishing, Event::PublishFailed | Event::VmStartFailed | Event::Interrupted) => {
                (State::Failed, vec![Action::StopVm, Action::Retire])
            }
            (State::Publishing | State::Running | State::Failed | State::Discarding, Event::DiscardRequested) => {
                (State::Discarding, vec![Action::StopVm, Action::Retire, Action::Remove])
            }
            (State::Discarding, Event::Removed) => (State::Discarded, vec![]),
            (state, _) => (state, vec![Action::Refuse]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 5] = [State::Publishing, State::Running, State::Failed, State::Discarding, State::Discarded];
    const EVENTS: [Event; 7] = [
        Event::Published,
        Event::PublishFailed,
        Event::VmStarted,
        Event::VmStartFailed,
        Event::Interrupted,
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
        for state in [State::Publishing, State::Running, State::Failed, State::Discarding] {
            let (next, actions) = state.apply(Event::DiscardRequested);
            assert_eq!((next, actions), (State::Discarding, vec![Action::StopVm, Action::Retire, Action::Remove]));
        }
    }

    #[test]
    fn no_failure_removes_an_overlay() {
        for state in STATES {
            for event in EVENTS.into_iter().filter(|event| *event != Event::DiscardRequested) {
                assert!(!state.apply(event).1.contains(&Action::Remove), "{state} {event:?}");
            }
        }
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
