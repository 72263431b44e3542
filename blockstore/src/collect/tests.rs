//! Collect frees what nobody needs, and nothing else.

mod crash;
mod life;
mod schedule;
mod stage;

use std::cell::RefCell;

/// Rules that a test may break, to see that it notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    /// A pack stays as long as a backup may have found it.
    WaitForBackups,
}

thread_local! {
    static BROKEN: RefCell<Option<Rule>> = const { RefCell::new(None) };
}

/// Whether a rule is broken in this thread.
pub(super) fn broken(rule: Rule) -> bool {
    BROKEN.with_borrow(|broken| *broken == Some(rule))
}

/// Breaks a rule for as long as `work` runs in this thread.
fn with_broken<T>(rule: Rule, work: impl FnOnce() -> T) -> T {
    BROKEN.set(Some(rule));
    let result = work();
    BROKEN.set(None);
    result
}
