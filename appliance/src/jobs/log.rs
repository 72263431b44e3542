//! The job log: which jobs were started, and how they ended. Specification: docs/format/jobs.md
//!
//! Order of a job: (1) `started` is appended and synced; (2) who asked is answered with its number, and it works; (3)
//! `ended` is appended and synced; (4) it is shown as ended. A job that the log knows as started and not as ended was
//! interrupted: the next process shows it so, and does not start it again.

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Outcome, ProgressView};
use crate::journal::{self, Journal, JournalError};

const VERSION: u32 = 1;
/// A log of more lines than this is written anew with what is still listed.
const LINES_MAX: usize = 2000;
/// A result of more bytes is not kept: it was told to who waited for it.
const RESULT_MAX: usize = 64 << 10;

/// That a job was started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Started {
    pub id: u64,
    pub kind: String,
    pub subject: String,
    pub machine: Option<String>,
    pub by: String,
    pub time: DateTime<Utc>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

/// That it ended, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Ended {
    pub id: u64,
    pub seconds: f64,
    pub progress: ProgressView,
    #[serde(flatten)]
    pub outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
enum Record {
    Jobs { version: u32, next: u64 },
    Started(Started),
    Ended(Ended),
}

/// What the log tells at the start.
#[derive(Debug, Default)]
pub(super) struct Past {
    /// The number that the next job has at least.
    pub next: u64,
    /// All jobs that it knows, oldest first. All have ended: what had not is interrupted.
    pub jobs: Vec<(Started, Ended)>,
    /// The numbers of those that are interrupted since the log was last opened.
    pub fresh: Vec<u64>,
}

/// An open log.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    /// Absent after a failure; then jobs go on and are not logged.
    journal: Option<Journal>,
    lines: usize,
}

impl Log {
    /// Reads a log and opens it for more. Jobs that had not ended are interrupted, and the log says so when this returns.
    /// A log that is damaged is set aside, and what is good in it goes on.
    pub fn open(path: PathBuf) -> (Log, Past) {
        let (records, fresh) = match Journal::open::<Record>(&path) {
            Ok((_, records)) => (records, false),
            Err(JournalError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => (Vec::new(), true),
            Err(error) => {
                let aside = path.with_added_extension(Utc::now().format("damaged-%Y%m%dT%H%M%S").to_string());
                tracing::error!(%error, aside = %aside.display(), "the job log is set aside; what is good in it goes on");
                let records = journal::read_good::<Record>(&path);
                if let Err(error) = std::fs::rename(&path, &aside) {
                    tracing::error!(%error, "it stays where it is");
                }
                (records, true)
            }
        };
        let lines = records.len();
        let past = past_of(records);
        for (job, _) in past.jobs.iter().filter(|(job, _)| past.fresh.contains(&job.id)) {
            tracing::warn!(job = job.id, kind = job.kind, subject = job.subject, "this job was interrupted");
        }
        let mut log = Log { path, journal: None, lines };
        if fresh || !past.fresh.is_empty() || lines == 0 || lines > LINES_MAX {
            log.rewrite(past.next, past.jobs.iter().cloned());
        } else {
            log.reopen();
        }
        (log, past)
    }

    pub fn started(&mut self, started: Started) {
        self.append(&Record::Started(started));
    }

    pub fn ended(&mut self, ended: Ended) {
        self.append(&Record::Ended(shortened(ended)));
    }

    /// Whether it is time to write it anew.
    pub fn is_long(&self) -> bool {
        self.lines > LINES_MAX
    }

    /// Writes it anew with these jobs. One that has not ended is given as it stands.
    pub fn rewrite(&mut self, next: u64, jobs: impl Iterator<Item = (Started, Ended)>) {
        let mut records = vec![Record::Jobs { version: VERSION, next }];
        for (started, ended) in jobs {
            records.push(Record::Started(started));
            if ended.outcome != Outcome::Running {
                records.push(Record::Ended(shortened(ended)));
            }
        }
        self.lines = records.len();
        self.journal = None;
        match journal::replace(&self.path, &records) {
            Ok(()) => self.reopen(),
            Err(error) => tracing::error!(error = %crate::problem::chain(&error), "jobs are not logged"),
        }
    }

    fn reopen(&mut self) {
        self.journal = match Journal::open::<Record>(&self.path) {
            Ok((journal, _)) => Some(journal),
            Err(error) => {
                tracing::error!(error = %crate::problem::chain(&error), "jobs are not logged");
                None
            }
        };
    }

    /// A job is not kept from its work by a log that cannot be written: a restore may be what makes room.
    fn append(&mut self, record: &Record) {
        let Some(journal) = &mut self.journal else { return };
        self.lines += 1;
        if let Err(error) = journal.append(record) {
            tracing::error!(error = %crate::problem::chain(&error), "jobs are not logged any more until a restart");
            self.journal = None;
        }
    }
}

fn shortened(mut ended: Ended) -> Ended {
    if let Outcome::Done { result } = &mut ended.outcome
        && result.to_string().len() > RESULT_MAX
    {
        *result = Value::Null;
    }
    ended
}

/// What records tell.
fn past_of(records: Vec<Record>) -> Past {
    let mut past = Past::default();
    let mut open: Vec<Started> = Vec::new();
    for record in records {
        match record {
            Record::Jobs { next, .. } => past.next = past.next.max(next),
            Record::Started(started) => {
                past.next = past.next.max(started.id.saturating_add(1));
                open.push(started);
            }
            Record::Ended(ended) => {
                if let Some(at) = open.iter().position(|started| started.id == ended.id) {
                    past.jobs.push((open.remove(at), ended));
                }
            }
        }
    }
    for started in open {
        let id = started.id;
        let ended = Ended { id, seconds: 0.0, progress: ProgressView::default(), outcome: Outcome::Interrupted };
        past.fresh.push(id);
        past.jobs.push((started, ended));
    }
    past.jobs.sort_by_key(|(started, _)| started.id);
    past
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(id: u64) -> Started {
        let time = Utc::now();
        Started {
            id,
            kind: "backup".into(),
            subject: "machine a".into(),
            machine: Some("a".into()),
            by: "owner".into(),
            time,
            key: None,
        }
    }

    fn ended(id: u64, outcome: Outcome) -> Ended {
        Ended { id, seconds: 1.5, progress: ProgressView::default(), outcome }
    }

    #[test]
    fn a_cut_at_every_byte_loses_no_job_and_ends_none_twice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("jobs");
        let (mut log, past) = Log::open(path.clone());
        assert_eq!((past.next, past.jobs.len()), (0, 0));
        let empty = std::fs::read(&path).unwrap().len();
        log.started(started(1));
        log.started(started(2));
        log.ended(ended(1, Outcome::Done { result: Value::from(7) }));
        let good = std::fs::read(&path).unwrap();
        for cut in empty..=good.len() {
            std::fs::write(&path, &good[..cut]).unwrap();
            let lines = good[..cut].iter().filter(|byte| **byte == b'\n').count();
            for round in ["at first", "again"] {
                let (_, past) = Log::open(path.clone());
                let told: Vec<_> = past.jobs.iter().map(|(job, end)| (job.id, end.outcome.clone())).collect();
                let first = if lines == 4 { Outcome::Done { result: Value::from(7) } } else { Outcome::Interrupted };
                let expected = [(1, first), (2, Outcome::Interrupted)];
                assert_eq!(told, expected[..(lines - 1).min(2)], "cut {cut}, {round}");
            }
        }
    }

    #[test]
    fn a_damaged_log_is_set_aside_and_its_numbers_are_not_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("jobs");
        let (mut log, _) = Log::open(path.clone());
        for id in 1..=3 {
            log.started(started(id));
            log.ended(ended(id, Outcome::Done { result: Value::Null }));
        }
        let mut bad = std::fs::read(&path).unwrap();
        let at = bad.iter().position(|byte| *byte == b'\n').unwrap() + 30;
        bad[at] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        let (_, past) = Log::open(path);
        assert_eq!(past.next, 4);
        assert_eq!(past.jobs.iter().map(|(job, _)| job.id).collect::<Vec<_>>(), [2, 3]);
        let aside = std::fs::read_dir(dir.path()).unwrap().flatten();
        assert_eq!(aside.filter(|entry| entry.file_name().to_string_lossy().contains("damaged")).count(), 1);
    }

    #[test]
    fn a_result_that_is_too_long_is_not_kept() {
        let long = Outcome::Done { result: Value::from("x".repeat(RESULT_MAX)) };
        assert_eq!(shortened(ended(1, long)).outcome, Outcome::Done { result: Value::Null });
    }
}
