//! The audit log read from its beginning, line by line: a log of years takes no more memory than one of a day.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use blake3::Hash;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Chained, End, GENESIS, LINE_MAX, Record, end_of, link, take_apart};
use crate::problem::{Kind, Problem};

/// So many damaged lines are named.
const NAMED_MAX: usize = 100;
/// So many records at once.
const LIMIT_MAX: usize = 10_000;

/// Which records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AuditQuery {
    /// Only those with a higher number, from the oldest on; the newest ones if absent.
    pub after: Option<u64>,
    /// At most so many; 100 if absent.
    pub limit: Option<usize>,
}

/// What is wrong with a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Damage {
    /// The line, from 1.
    pub line: u64,
    /// What is wrong with it.
    pub problem: String,
}

/// Whether the log is what was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VerifyResult {
    /// Whether the chain holds from the first record to the last, and goes through the hash that was asked for.
    pub ok: bool,
    /// How many records there are.
    pub records: u64,
    /// The hash of the last one. Who notes it elsewhere can have it looked for later.
    pub head: String,
    /// Whether the hash that was asked for is in it; absent if none was.
    pub head_found: Option<bool>,
    /// So often a crash had left a torn end.
    pub torn_ends: u64,
    /// The lines at which the chain breaks, the first hundred.
    pub damaged: Vec<Damage>,
}

/// Calls `with` for every line in the first `len` bytes, without its end.
fn lines(path: &Path, len: u64, mut with: impl FnMut(u64, &[u8])) -> Result<(), Problem> {
    let mut read = || -> io::Result<()> {
        let mut file = BufReader::new(File::open(path)?.take(len));
        let (mut line, mut number) = (Vec::new(), 0);
        loop {
            line.clear();
            // A line that is too long comes in pieces, each of them damaged.
            if (&mut file).take(LINE_MAX as u64).read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            number += 1;
            if line.last() == Some(&b'\n') {
                line.pop();
            }
            with(number, &line);
        }
    };
    read().map_err(|error| Problem::failed(format!("cannot read the audit log {}", path.display()), &error))
}

pub(super) fn list(path: &Path, len: u64, query: &AuditQuery) -> Result<Vec<Chained>, Problem> {
    let limit = query.limit.unwrap_or(100);
    if limit == 0 || limit > LIMIT_MAX {
        return Err(Problem::usage(format!("cannot list {limit} records")).hint(format!("ask for 1 to {LIMIT_MAX}")));
    }
    let mut found: VecDeque<Chained> = VecDeque::new();
    lines(path, len, |_, line| {
        let Some((hash, json)) = take_apart(line) else { return };
        let Ok(record) = serde_json::from_slice::<Record>(json) else { return };
        if query.after.is_some_and(|after| record.number <= after || found.len() == limit) {
            return;
        }
        if found.len() == limit {
            found.pop_front();
        }
        found.push_back(Chained { hash: hash.to_hex().to_string(), record });
    })?;
    Ok(found.into())
}

pub(super) fn verify(path: &Path, len: u64, head: Option<&str>) -> Result<VerifyResult, Problem> {
    let wanted = head.map(|text| {
        Hash::from_hex(text).map_err(|_| {
            Problem::new(Kind::Usage, format!("`{text}` is not a hash of the audit log"))
                .hint("`lifeboat audit verify` shows the last one, 64 hexadecimal digits")
        })
    });
    let wanted = wanted.transpose()?;
    let mut end = End { head: Hash::from_bytes(GENESIS), number: 0 };
    let mut result = VerifyResult {
        ok: true,
        records: 0,
        head: String::new(),
        head_found: wanted.map(|_| false),
        torn_ends: 0,
        damaged: Vec::new(),
    };
    lines(path, len, |number, line| {
        result.records += 1;
        let problem =
            match take_apart(line).map(|(stated, json)| (stated, json, serde_json::from_slice::<Record>(json))) {
                None => Some("it is not a record".to_owned()),
                Some((stated, json, _)) if stated != link(&end.head, json) => {
                    Some("its hash is not that of what it says and what came before".to_owned())
                }
                Some((_, _, Err(error))) => Some(format!("it is not a record: {error}")),
                Some((_, _, Ok(record))) if record.number != end.number + 1 => {
                    Some(format!("it has the number {} and should have {}", record.number, end.number + 1))
                }
                Some((stated, _, Ok(record))) => {
                    result.torn_ends += u64::from(matches!(record.event, super::Event::TornEnd { .. }));
                    if wanted == Some(stated) {
                        result.head_found = Some(true);
                    }
                    None
                }
            };
        if let Some(problem) = problem {
            result.ok = false;
            if result.damaged.len() < NAMED_MAX {
                result.damaged.push(Damage { line: number, problem });
            }
        }
        end = end_of(line);
    })?;
    result.ok &= result.head_found != Some(false);
    result.head = end.head.to_hex().to_string();
    Ok(result)
}
