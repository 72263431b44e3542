//! Ends the process where a test wants it to: right before or right after a record of a journal is durable. Programs
//! built for release have none of this.

/// On which side of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Nothing of it is written.
    Before,
    /// It is durable.
    After,
}

/// Kills this process if `LIFEBOAT_TEST_CRASH` is `before:TEXT` or `after:TEXT` and the record has the text in it.
#[cfg(debug_assertions)]
pub fn here(moment: Moment, record: &[u8]) {
    let Ok(wanted) = std::env::var("LIFEBOAT_TEST_CRASH") else { return };
    let text = match (wanted.split_once(':'), moment) {
        (Some(("before", text)), Moment::Before) | (Some(("after", text)), Moment::After) => text,
        _ => return,
    };
    if String::from_utf8_lossy(record).contains(text) {
        // As `kill -9` does it: nothing is tidied up.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// Does nothing.
#[cfg(not(debug_assertions))]
pub fn here(_: Moment, _: &[u8]) {}
