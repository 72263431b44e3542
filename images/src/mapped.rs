//! A file, or a part of a disk, as a list of runs: where each piece of it lies on the disk below.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use crate::bytes::{part, size};
use crate::fs::FsError;
use crate::{DiskImage, SharedDisk};

/// Longest list: 128 MiB of memory, a file of 16 GiB in the worst case and any sane file of any size.
const RUNS_MAX: usize = 4 << 20;

/// A piece that lies in one place. What lies between two runs reads as zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    start: u64,
    length: u64,
    offset: u64,
}

/// Builds a [`Mapped`]; runs come in order.
#[derive(Debug, Default)]
pub(crate) struct Runs(Vec<Run>);

impl Runs {
    /// Where the next run may begin.
    pub(crate) fn end(&self) -> u64 {
        self.0.last().map_or(0, |run| run.start + run.length)
    }

    /// Adds `length` bytes at `start` of the file, which lie at `offset` of the disk.
    pub(crate) fn push(&mut self, object: &dyn std::fmt::Display, run: (u64, u64, u64)) -> Result<(), FsError> {
        let (start, length, offset) = run;
        if length == 0 {
            return Ok(());
        }
        if start < self.end() || start.checked_add(length).is_none() || offset.checked_add(length).is_none() {
            return Err(FsError::damaged(object, "its extents overlap or are out of order"));
        }
        let full = self.0.len() >= RUNS_MAX;
        match self.0.last_mut() {
            Some(last) if last.start + last.length == start && last.offset + last.length == offset => {
                last.length += length;
            }
            _ if full => {
                return Err(FsError::damaged(object, "it has more extents than any file should"));
            }
            _ => self.0.push(Run { start, length, offset }),
        }
        Ok(())
    }

    /// With other places for some ranges, the later ones over the earlier: start, length, and where it lies now, or nothing
    /// where it reads as zeroes.
    pub(crate) fn moved(
        self,
        object: &dyn std::fmt::Display,
        ranges: impl Iterator<Item = (u64, u64, Option<u64>)>,
    ) -> Result<Runs, FsError> {
        let mut pieces: BTreeMap<u64, (u64, u64)> =
            self.0.into_iter().map(|run| (run.start, (run.length, run.offset))).collect();
        for (start, length, place) in ranges {
            let end = start.saturating_add(length);
            let first = pieces.range(..start).next_back().map_or(start, |(first, _)| *first);
            let touched: Vec<u64> = pieces.range(first..end).map(|(start, _)| *start).collect();
            for at in touched {
                let Some((held, offset)) = pieces.get(&at).copied().filter(|(held, _)| at + held > start) else {
                    continue;
                };
                pieces.remove(&at);
                if at < start {
                    pieces.insert(at, (start - at, offset));
                }
                if at + held > end {
                    pieces.insert(end, (at + held - end, offset + (end - at)));
                }
            }
            if let Some(place) = place {
                pieces.insert(start, (length, place));
            }
        }
        let mut runs = Runs::default();
        for (start, (length, offset)) in pieces {
            runs.push(object, (start, length, offset))?;
        }
        Ok(runs)
    }

    /// Without what lies behind byte `end`, which then reads as zeroes.
    pub(crate) fn cut(mut self, end: u64) -> Runs {
        self.0.retain_mut(|run| {
            run.length = run.length.min(end.saturating_sub(run.start));
            run.length > 0
        });
        self
    }

    /// The file of `size` bytes that these runs are.
    pub(crate) fn over(self, disk: SharedDisk, size: u64) -> Mapped {
        Mapped { disk, runs: self.0, size }
    }
}

/// Bytes that lie in runs on a disk.
pub(crate) struct Mapped {
    disk: SharedDisk,
    runs: Vec<Run>,
    size: u64,
}

impl Mapped {
    /// One run: a partition.
    pub(crate) fn slice(disk: SharedDisk, offset: u64, size: u64) -> Mapped {
        let runs = if size == 0 { Vec::new() } else { vec![Run { start: 0, length: size, offset }] };
        Mapped { disk, runs, size }
    }

    /// The first run that ends behind `offset`.
    fn first(&self, offset: u64) -> usize {
        self.runs.partition_point(|run| run.start + run.length <= offset)
    }
}

impl DiskImage for Mapped {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.size);
        let Some(end) = end else {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the read reaches past the end"));
        };
        let mut at = offset;
        let mut rest = buf;
        for run in self.runs.get(self.first(offset)..).unwrap_or_default() {
            if at >= end || run.start >= end {
                break;
            }
            let gap = run.start.saturating_sub(at);
            let (zeroes, left) = std::mem::take(&mut rest).split_at_mut(size(gap));
            zeroes.fill(0);
            at += gap;
            let length = (run.start + run.length).min(end) - at;
            let (filled, left) = left.split_at_mut(size(length));
            self.disk.read_at(run.offset + (at - run.start), filled)?;
            at += length;
            rest = left;
        }
        rest.fill(0);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        for run in self.runs.get(self.first(offset)..).unwrap_or_default() {
            let start = run.start.max(offset);
            if start >= self.size {
                break;
            }
            let end = (run.start + run.length).min(self.size);
            // What is a hole of the disk is one of the file.
            let below = run.offset + (start - run.start);
            match self.disk.next_data(below)? {
                Some(data) if data.start < run.offset + (end - run.start) => {
                    let start = start + (data.start.max(below) - below);
                    return Ok(Some(start..end.min(start + (data.end - data.start.max(below)))));
                }
                _ => {}
            }
        }
        Ok(None)
    }
}

/// Content that is kept in memory: files that lie in their own metadata. What is missing of their size is a hole.
pub(crate) struct Inline {
    pub bytes: Vec<u8>,
    pub size: u64,
}

impl DiskImage for Inline {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.size) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the read reaches past the end"));
        }
        let found = part(&self.bytes, size(offset), buf.len());
        let (filled, rest) = buf.split_at_mut(found.len());
        filled.copy_from_slice(found);
        rest.fill(0);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let end = self.size.min(self.bytes.len() as u64);
        Ok((offset < end).then_some(offset..end))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::fs::test_support::Memory;

    #[test]
    fn ranges_that_moved_lie_over_the_others() {
        let mut runs = Runs::default();
        for run in [(0, 10, 100), (20, 10, 200)] {
            runs.push(&"file", run).unwrap();
        }
        let moved = [(5, 20, Some(300)), (22, 2, None), (28, 10, Some(50)), (7, 1, Some(7))];
        let found: Vec<(u64, u64, u64)> = runs
            .moved(&"file", moved.into_iter())
            .unwrap()
            .0
            .iter()
            .map(|run| (run.start, run.length, run.offset))
            .collect();
        assert_eq!(
            found,
            [(0, 5, 100), (5, 2, 300), (7, 1, 7), (8, 14, 303), (24, 1, 319), (25, 3, 205), (28, 10, 50)]
        );
    }

    #[test]
    fn holes_lie_between_runs() {
        let disk: SharedDisk = Arc::new(Memory((0..200).collect()));
        let mut runs = Runs::default();
        for run in [(10, 5, 100), (15, 5, 105), (30, 4, 0)] {
            runs.push(&"file", run).unwrap();
        }
        assert!(runs.push(&"file", (33, 1, 0)).is_err(), "it overlaps");
        assert!(runs.push(&"file", (u64::MAX, 2, 0)).is_err());
        let file = runs.over(disk, 40);
        let mut all = [0xee; 40];
        file.read_at(0, &mut all).unwrap();
        assert_eq!(all[..10], [0; 10]);
        assert_eq!(all[10..20], (100..110).collect::<Vec<u8>>()[..]);
        assert_eq!(all[20..30], [0; 10]);
        assert_eq!(all[30..34], [0, 1, 2, 3]);
        assert_eq!(all[34..], [0; 6]);
        for offset in 0..40_u64 {
            for length in 0..=40 - offset {
                let mut part = vec![0xee; size(length)];
                file.read_at(offset, &mut part).unwrap();
                assert_eq!(part, all[size(offset)..size(offset + length)]);
            }
        }
        assert_eq!(file.next_data(0).unwrap(), Some(10..20));
        assert_eq!(file.next_data(20).unwrap(), Some(30..34));
        assert_eq!(file.next_data(34).unwrap(), None);
        assert!(file.read_at(39, &mut [0; 2]).is_err());
    }
}
