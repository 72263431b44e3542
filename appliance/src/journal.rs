//! Files of checksummed lines: the append-only journal that is the only durable record of where a recovery stands, and
//! small tables that are replaced as a whole. Specification: docs/format/recovery-journal.md, docs/format/tokens.md
//!
//! Each line is `CRC32C-hex SPACE JSON LF`. Appending writes the whole line and syncs it before anything is done
//! that the line speaks of. A last line without its end or with a wrong checksum was never acted on and is cut.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::crash::{self, Moment};

/// A journal longer than this is not one of ours.
const LEN_MAX: u64 = 16 << 20;

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system failed.
    #[error("cannot use journal {}", path.display())]
    Io {
        /// The journal.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line other than the last is damaged.
    #[error("line {line} of journal {} is damaged", path.display())]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
    /// An earlier append failed, so what the file holds is not known.
    #[error("journal {} failed before and must be opened anew", path.display())]
    Poisoned {
        /// The journal.
        path: PathBuf,
    },
}

/// An open journal, positioned at its end.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    poisoned: bool,
}

impl Journal {
    /// Creates a journal whose name is durable when this returns.
    pub fn create(path: &Path) -> Result<Journal, JournalError> {
        let make = || {
            let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(path)?;
            file.sync_all()?;
            match path.parent() {
                Some(dir) => File::open(dir)?.sync_all()?,
                None => return Err(io::ErrorKind::InvalidInput.into()),
            }
            Ok(file)
        };
        let file = make().map_err(|source| JournalError::Io { path: path.to_owned(), source })?;
        Ok(Journal { path: path.to_owned(), file, poisoned: false })
    }

    /// Opens a journal, cuts a torn last line and returns its records in order.
    pub fn open<T: DeserializeOwned>(path: &Path) -> Result<(Journal, Vec<T>), JournalError> {
        let io_error = |source| JournalError::Io { path: path.to_owned(), source };
        let file = OpenOptions::new().read(true).append(true).open(path).map_err(io_error)?;
        let len = file.metadata().map_err(io_error)?.len();
        if len > LEN_MAX {
            return Err(io_error(io::Error::new(io::ErrorKind::FileTooLarge, "too long for a journal")));
        }
        let mut bytes = Vec::new();
        (&file).take(LEN_MAX).read_to_end(&mut bytes).map_err(io_error)?;
        let (records, good) = parse(&bytes).map_err(|line| JournalError::Damaged { path: path.to_owned(), line })?;
        if good < bytes.len() {
            let cut = || {
                file.set_len(good as u64)?;
                file.sync_all()
            };
            cut().map_err(io_error)?;
        }
        Ok((Journal { path: path.to_owned(), file, poisoned: false }, records))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends a record; it is durable when this returns. After a failure the journal refuses to go on.
    pub fn append(&mut self, record: &impl Serialize) -> Result<(), JournalError> {
        if self.poisoned {
            return Err(JournalError::Poisoned { path: self.path.clone() });
        }
        let result = encode(record).and_then(|line| {
            crash::here(Moment::Before, &line);
            self.file.write_all(&line)?;
            self.file.sync_data()?;
            crash::here(Moment::After, &line);
            Ok(())
        });
        result.map_err(|source| {
            self.poisoned = true;
            JournalError::Io { path: self.path.clone(), source }
        })
    }
}

/// One record as a line.
pub fn encode(record: &impl Serialize) -> io::Result<Vec<u8>> {
    let json = serde_json::to_string(record)?;
    Ok(format!("{:08x} {json}\n", crc32c::crc32c(json.as_bytes())).into_bytes())
}

/// Replaces a table of records, or makes it.
///
/// Order: 1. the new file is written and synced under another name; 2. it takes the table's name; 3. the folder is
/// synced. Before 2 the old table counts, from then on the new one; a left-over of 1 is written over next time.
pub fn replace<T: Serialize>(path: &Path, records: impl IntoIterator<Item = T>) -> Result<(), JournalError> {
    let replace = || {
        let mut bytes = Vec::new();
        for record in records {
            bytes.extend(encode(&record)?);
        }
        let fresh = path.with_added_extension("new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        std::fs::rename(&fresh, path)?;
        match path.parent() {
            Some(dir) => File::open(dir)?.sync_all(),
            None => Err(io::ErrorKind::InvalidInput.into()),
        }
    };
    replace().map_err(|source| JournalError::Io { path: path.to_owned(), source })
}

/// The records of a table; none if there is no file. It is replaced as a whole, so a torn line is damage.
pub fn read_table<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, JournalError> {
    let bytes = match read(path) {
        Err(JournalError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        bytes => bytes?,
    };
    let damaged = |line| JournalError::Damaged { path: path.to_owned(), line };
    let (records, good) = parse(&bytes).map_err(damaged)?;
    if good < bytes.len() { Err(damaged(records.len() + 1)) } else { Ok(records) }
}

/// The records of a damaged journal that are good, whatever stands between them.
pub fn read_good<T: DeserializeOwned>(path: &Path) -> Vec<T> {
    let bytes = read(path).unwrap_or_default();
    bytes.split_inclusive(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn read(path: &Path) -> Result<Vec<u8>, JournalError> {
    let read = || {
        let mut bytes = Vec::new();
        if File::open(path)?.take(LEN_MAX + 1).read_to_end(&mut bytes)? as u64 > LEN_MAX {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "too long for a journal"));
        }
        Ok(bytes)
    };
    read().map_err(|source| JournalError::Io { path: path.to_owned(), source })
}

/// The records and the length of the good part, or the number of a damaged line that others follow.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<(Vec<T>, usize), usize> {
    let mut records = Vec::new();
    let mut good = 0;
    let mut lines = bytes.split_inclusive(|byte| *byte == b'\n').enumerate().peekable();
    while let Some((number, line)) = lines.next() {
        match parse_line(line) {
            Some(record) => records.push(record),
            None if lines.peek().is_none() => break,
            None => return Err(number + 1),
        }
        good += line.len();
    }
    Ok((records, good))
}

fn parse_line<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let (checksum, json) = line.split_once(' ')?;
    if u32::from_str_radix(checksum, 16).ok()? != crc32c::crc32c(json.as_bytes()) {
        return None;
    }
    serde_json::from_str(json).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(records: &[&str]) -> Vec<u8> {
        records.iter().flat_map(|record| encode(record).unwrap()).collect()
    }

    #[test]
    fn a_line_has_these_bytes() {
        assert_eq!(encode(&"running").unwrap(), b"f37b0b5f \"running\"\n".to_vec());
    }

    #[test]
    fn records_come_back_in_order_after_a_reopen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::create(&path).unwrap();
        journal.append(&"a").unwrap();
        journal.append(&"b").unwrap();
        drop(journal);
        let (mut journal, records) = Journal::open::<String>(&path).unwrap();
        assert_eq!(records, ["a", "b"]);
        journal.append(&"c").unwrap();
        assert_eq!(Journal::open::<String>(&path).unwrap().1, ["a", "b", "c"]);
        assert!(Journal::create(&path).is_err());
    }

    #[test]
    fn a_cut_at_every_byte_keeps_the_whole_lines_before_it() {
        let bytes = written(&["first", "second", "third"]);
        for cut in 0..=bytes.len() {
            let whole = bytes[..cut].iter().filter(|byte| **byte == b'\n').count();
            let (records, good) = parse::<String>(&bytes[..cut]).unwrap();
            assert_eq!(records.len(), whole, "cut {cut}");
            assert!(good <= cut);
        }
    }

    #[test]
    fn damage_before_the_last_line_is_not_passed_over() {
        let mut bytes = written(&["first", "second"]);
        bytes[12] ^= 1;
        assert_eq!(parse::<String>(&bytes), Err(1));
    }
}
