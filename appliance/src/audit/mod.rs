//! The audit log: who has changed what through the API, when, and what came of it. Append-only; every record carries the
//! hash of all that came before it, so that none can be changed, taken out or put in unnoticed.
//! Specification: docs/format/audit.md
//!
//! Order of a change: (1) `asked` is appended and synced; (2) the change is made; (3) `answered` is appended and synced;
//! (4) the asker is answered. So nothing changes that the log does not name, and a change that was cut off by a crash
//! stands there as asked and never answered.

mod read;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use blake3::Hash;
use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use read::{AuditQuery, Damage, VerifyResult};

use crate::problem::{Kind, Problem};

/// Longest line. What a record quotes is cut to [`TEXT_MAX`] first.
const LINE_MAX: usize = 16 << 10;
/// Longest text that a record quotes.
const TEXT_MAX: usize = 1024;
/// What the chain begins with.
const GENESIS: [u8; 32] = [0; 32];

/// What an answer was about; it goes with the response, for the record.
#[derive(Debug, Clone)]
pub struct About(pub String);

/// What a record tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// Somebody asks for a change, and may.
    Asked {
        /// Who: `owner`, or a token with its id.
        who: String,
        /// The address he asks from; absent on the state folder's socket.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<String>,
        /// Method and path of the API.
        what: String,
    },
    /// What came of it.
    Answered {
        /// The number of the record that says who asked for what.
        asked: u64,
        /// The HTTP status.
        status: u16,
        /// What it was about, or why it failed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        about: Option<String>,
    },
    /// A job ended.
    JobEnded {
        /// Its number.
        job: u64,
        /// What it was.
        what: String,
        /// `done`, `failed` or `interrupted`.
        result: String,
    },
    /// A crash had left a torn end, which was cut off.
    TornEnd {
        /// So many bytes.
        bytes: u64,
    },
}

/// A record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Record {
    /// Its number, from 1.
    pub number: u64,
    /// When it was appended.
    pub time: DateTime<Utc>,
    /// What it tells.
    #[serde(flatten)]
    pub event: Event,
}

/// A record with its place in the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Chained {
    /// The hash of this record and all before it.
    pub hash: String,
    /// The record.
    #[serde(flatten)]
    pub record: Record,
}

fn link(before: &Hash, json: &[u8]) -> Hash {
    blake3::Hasher::new().update(before.as_bytes()).update(json).finalize()
}

/// What a line says, if it has the form of one: the hash it states and the bytes of its record.
fn take_apart(line: &[u8]) -> Option<(Hash, &[u8])> {
    let (hash, rest) = line.split_at_checked(64)?;
    Some((Hash::from_hex(hash).ok()?, rest.strip_prefix(b" ")?))
}

/// Where the chain stands.
#[derive(Debug, Clone, Copy)]
struct End {
    head: Hash,
    number: u64,
}

#[derive(Debug)]
struct Open {
    file: File,
    end: End,
}

/// The log of a state folder.
#[derive(Debug)]
pub struct Audit {
    path: PathBuf,
    /// Absent if it cannot be opened, and after a write or sync that failed: what the file holds is not known then.
    open: Mutex<Option<Open>>,
}

impl Audit {
    /// Opens the log, or makes it. A torn end is cut off, and that is recorded. A log that cannot be opened is one that
    /// nothing can be appended to: machines are recovered all the same.
    pub fn open(path: PathBuf) -> Audit {
        let (open, torn) = match open(&path) {
            Ok((open, torn)) => (Some(open), torn),
            Err(error) => {
                tracing::error!(log = %path.display(), %error, "cannot use the audit log");
                (None, 0)
            }
        };
        let audit = Audit { path, open: Mutex::new(open) };
        if torn > 0 {
            tracing::warn!(bytes = torn, "a crash had left a torn end in the audit log; it was cut off");
            if let Err(problem) = audit.append(Event::TornEnd { bytes: torn }) {
                tracing::error!(%problem, "that stands in no record");
            }
        }
        audit
    }

    /// Appends a record and returns its number. It is durable when this returns; after a failure nothing is appended
    /// until the log is opened anew.
    pub fn append(&self, event: Event) -> Result<u64, Problem> {
        let mut slot = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(open) = slot.as_mut() else {
            return Err(Problem::new(Kind::Failed, format!("the audit log {} cannot be used", self.path.display()))
                .hint("the log of the service says why; it is opened anew when the service starts again"));
        };
        let result = append(open, event);
        if result.is_err() {
            *slot = None;
        }
        result.map_err(|error| Problem::failed(format!("cannot write the audit log {}", self.path.display()), &error))
    }

    /// Records, oldest first.
    pub fn list(&self, query: &AuditQuery) -> Result<Vec<Chained>, Problem> {
        read::list(&self.path, self.len()?, query)
    }

    /// Looks whether the chain holds, and whether `head`, a hash noted earlier, is in it.
    pub fn verify(&self, head: Option<&str>) -> Result<VerifyResult, Problem> {
        read::verify(&self.path, self.len()?, head)
    }

    /// The length at a moment when no record is half written.
    fn len(&self) -> Result<u64, Problem> {
        let _still = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let len = std::fs::metadata(&self.path).map(|metadata| metadata.len());
        len.map_err(|error| Problem::failed(format!("cannot read the audit log {}", self.path.display()), &error))
    }
}

/// A text as a record quotes it.
pub fn quoted(text: &str) -> String {
    let mut quoted: String = text.chars().take(TEXT_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect();
    while quoted.len() > TEXT_MAX {
        quoted.pop();
    }
    quoted
}

fn append(open: &mut Open, event: Event) -> io::Result<u64> {
    let record = Record { number: open.end.number + 1, time: Utc::now(), event };
    let json = serde_json::to_vec(&record)?;
    let head = link(&open.end.head, &json);
    let mut line = head.to_hex().as_bytes().to_vec();
    line.push(b' ');
    line.extend(&json);
    line.push(b'\n');
    if line.len() > LINE_MAX {
        return Err(io::Error::other("the record is too long"));
    }
    open.file.write_all(&line)?;
    open.file.sync_data()?;
    open.end = End { head, number: record.number };
    Ok(record.number)
}

/// Order for a new file: its name is durable before the first record.
fn open(path: &Path) -> io::Result<(Open, u64)> {
    let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
    let len = file.metadata()?.len();
    if len == 0 {
        let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        File::open(dir)?.sync_all()?;
        return Ok((Open { file, end: End { head: Hash::from_bytes(GENESIS), number: 0 } }, 0));
    }
    // The end: at most one torn line behind the last whole one.
    let window = (2 * LINE_MAX as u64).min(len);
    file.seek(SeekFrom::Start(len - window))?;
    let mut tail = Vec::new();
    (&file).take(window).read_to_end(&mut tail)?;
    let whole = tail.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let torn = tail.len() - whole;
    if whole == 0 && window < len {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "its end is not that of an audit log"));
    }
    if torn > 0 {
        file.set_len(len - torn as u64)?;
        file.sync_all()?;
    }
    let last = tail.get(..whole.saturating_sub(1)).unwrap_or_default();
    let last = last.iter().rposition(|byte| *byte == b'\n').map_or(last, |at| last.get(at + 1..).unwrap_or_default());
    Ok((Open { file, end: end_of(last) }, torn as u64))
}

/// Where the chain goes on behind a last line. One that is damaged is told by `verify`; the chain goes on from its bytes.
fn end_of(line: &[u8]) -> End {
    if line.is_empty() {
        return End { head: Hash::from_bytes(GENESIS), number: 0 };
    }
    let Some((head, json)) = take_apart(line) else { return End { head: blake3::hash(line), number: 0 } };
    let number = serde_json::from_slice::<Record>(json).map_or(0, |record| record.number);
    End { head, number }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
