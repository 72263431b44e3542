//! What is kept of requests with a key. Specification: docs/format/requests.md

use std::path::PathBuf;

use chrono::Utc;
use serde::{Deserialize, Serialize};

use super::Answer;
use crate::journal::{self, Journal, JournalError};

const VERSION: u32 = 1;
/// A file of more lines, or bytes, is written anew.
const LINES_MAX: usize = 4000;
const BYTES_MAX: usize = 12 << 20;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
enum Record {
    Requests {
        version: u32,
    },
    Begun {
        key: String,
        body: String,
    },
    Answered {
        key: String,
        #[serde(flatten)]
        answer: Answer,
    },
    Free {
        key: String,
    },
}

/// A request of the past: its key, its body's hash, and its answer if it is known that it was done.
pub(super) type Past = (String, String, Option<Answer>);

/// An open file.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    journal: Option<Journal>,
    lines: usize,
    bytes: usize,
}

impl Log {
    /// Reads the file; it is not yet open for more.
    pub fn read(path: PathBuf) -> (Log, Vec<Past>) {
        let records = match Journal::open::<Record>(&path) {
            Ok((_, records)) => records,
            Err(JournalError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                let aside = path.with_added_extension(Utc::now().format("damaged-%Y%m%dT%H%M%S").to_string());
                tracing::error!(%error, aside = %aside.display(), "requests are set aside; what is good of them goes on");
                let records = journal::read_good(&path);
                if let Err(error) = std::fs::rename(&path, &aside) {
                    tracing::error!(%error, "they stay where they are");
                }
                records
            }
        };
        let mut past: Vec<Past> = Vec::new();
        for record in records {
            match record {
                Record::Requests { .. } => {}
                Record::Begun { key, body } => {
                    // What was begun while the file was written anew stands in it twice.
                    past.retain(|(known, ..)| *known != key);
                    past.push((key, body, None));
                }
                Record::Answered { key, answer } => {
                    if let Some(begun) = past.iter_mut().rfind(|(known, ..)| *known == key) {
                        begun.2 = Some(answer);
                    }
                }
                Record::Free { key } => past.retain(|(known, ..)| *known != key),
            }
        }
        (Log { path, journal: None, lines: 0, bytes: 0 }, past)
    }

    pub fn begun(&mut self, key: &str, body: &str) -> Result<(), JournalError> {
        self.append(&Record::Begun { key: key.to_owned(), body: body.to_owned() }, body.len())
    }

    pub fn answered(&mut self, key: &str, answer: &Answer) -> Result<(), JournalError> {
        let length = answer.content.as_ref().map_or(0, String::len);
        self.append(&Record::Answered { key: key.to_owned(), answer: answer.clone() }, length)
    }

    pub fn free(&mut self, key: &str) -> Result<(), JournalError> {
        self.append(&Record::Free { key: key.to_owned() }, 0)
    }

    /// Whether it is time to write it anew.
    pub fn is_long(&self) -> bool {
        self.journal.is_none() || self.lines > LINES_MAX || self.bytes > BYTES_MAX
    }

    /// Writes it anew with what counts, and opens it for more.
    pub fn rewrite(&mut self, past: Vec<Past>) -> Result<(), JournalError> {
        let mut records = vec![Record::Requests { version: VERSION }];
        self.bytes = 0;
        for (key, body, answer) in past {
            records.push(Record::Begun { key: key.clone(), body });
            if let Some(answer) = answer {
                self.bytes += answer.content.as_ref().map_or(0, String::len);
                records.push(Record::Answered { key, answer });
            }
        }
        self.lines = records.len();
        self.journal = None;
        journal::replace(&self.path, &records)?;
        self.journal = Some(Journal::open::<Record>(&self.path)?.0);
        Ok(())
    }

    fn append(&mut self, record: &Record, length: usize) -> Result<(), JournalError> {
        let Some(journal) = &mut self.journal else { return Err(JournalError::Poisoned { path: self.path.clone() }) };
        self.lines += 1;
        self.bytes += length;
        let appended = journal.append(record);
        if appended.is_err() {
            self.journal = None; // written anew before the next
        }
        appended
    }
}
