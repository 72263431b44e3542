//! What a request in flight expects, and what has come so far: pure bookkeeping, no sockets.

use super::{ClientError, Violation};
use crate::export::ContextExtent;
use crate::limits::{MAX_CONTEXTS, MAX_EXTENTS};
use crate::wire::Errno;

/// Separate runs of data one read may be in; servers send in order, or nearly.
const MAX_RUNS: usize = 1024;

/// The outcome of a request that succeeded.
#[derive(Debug)]
pub(super) enum Answer {
    Done,
    Data(Vec<u8>),
    /// Extents by context number.
    Status(Vec<(u32, Vec<ContextExtent>)>),
}

/// A request in flight.
#[derive(Debug)]
pub(super) struct Expected {
    kind: Kind,
    error: Option<Errno>,
}

#[derive(Debug)]
enum Kind {
    Nothing,
    Read {
        offset: u64,
        data: Vec<u8>,
        /// Runs that have come, as start and end within the request, in order and apart.
        runs: Vec<(usize, usize)>,
    },
    Status {
        length: u64,
        found: Vec<(u32, Vec<ContextExtent>)>,
    },
}

impl Expected {
    pub(super) fn nothing() -> Expected {
        Expected { kind: Kind::Nothing, error: None }
    }

    pub(super) fn read(offset: u64, length: usize) -> Expected {
        Expected { kind: Kind::Read { offset, data: vec![0; length], runs: Vec::new() }, error: None }
    }

    pub(super) fn status(length: u64) -> Expected {
        Expected { kind: Kind::Status { length, found: Vec::new() }, error: None }
    }

    pub(super) fn is_read(&self) -> bool {
        matches!(self.kind, Kind::Read { .. })
    }

    /// Where the data of a simple reply goes: all of it at once.
    pub(super) fn place_all(&mut self) -> Result<&mut [u8], Violation> {
        match &self.kind {
            Kind::Read { offset, data, .. } => {
                let (offset, length) = (*offset, data.len());
                self.place(offset, length)
            }
            Kind::Nothing | Kind::Status { .. } => Err(Violation::Coverage),
        }
    }

    pub(super) fn fail(&mut self, error: Errno) {
        self.error.get_or_insert(error);
    }

    /// Notes that this range has come, and returns where its bytes go; holes are zeroes already.
    pub(super) fn place(&mut self, offset: u64, length: usize) -> Result<&mut [u8], Violation> {
        let Kind::Read { offset: first, data, runs } = &mut self.kind else { return Err(Violation::Coverage) };
        let start = offset.checked_sub(*first).and_then(|start| usize::try_from(start).ok());
        let start = start.ok_or(Violation::Coverage)?;
        let end = start.checked_add(length).ok_or(Violation::Coverage)?;
        let place = data.get_mut(start..end).filter(|place| !place.is_empty()).ok_or(Violation::Coverage)?;
        let at = runs.partition_point(|run| run.0 < start);
        let before = at.checked_sub(1).and_then(|before| runs.get(before)).copied();
        let after = runs.get(at).copied();
        if before.is_some_and(|run| run.1 > start) || after.is_some_and(|run| run.0 < end) {
            return Err(Violation::Coverage);
        }
        match (before, after) {
            (Some(run), _) if run.1 == start => {
                if let Some(run) = runs.get_mut(at - 1) {
                    run.1 = end;
                }
            }
            (_, Some(run)) if run.0 == end => {
                if let Some(run) = runs.get_mut(at) {
                    run.0 = start;
                }
            }
            _ if runs.len() < MAX_RUNS => runs.insert(at, (start, end)),
            _ => return Err(Violation::Coverage),
        }
        Ok(place)
    }

    /// Takes the descriptors of one context.
    pub(super) fn describe(
        &mut self,
        context: u32,
        extents: impl Iterator<Item = (u64, u32)>,
    ) -> Result<(), Violation> {
        let Kind::Status { length, found } = &mut self.kind else { return Err(Violation::Coverage) };
        if found.len() >= MAX_CONTEXTS || found.iter().any(|(of, _)| *of == context) {
            return Err(Violation::Coverage);
        }
        let mut left = *length;
        let mut taken = Vec::new();
        for (length, flags) in extents.take(8 * MAX_EXTENTS) {
            if length == 0 {
                return Err(Violation::Length);
            }
            // The last one may reach beyond the request; servers are allowed to tell more than was asked.
            let length = length.min(left);
            if length == 0 {
                break;
            }
            left -= length;
            taken.push(ContextExtent { length, flags });
        }
        if taken.is_empty() {
            return Err(Violation::Length);
        }
        found.push((context, taken));
        Ok(())
    }

    /// The last chunk has come.
    pub(super) fn finish(self) -> Result<Result<Answer, ClientError>, Violation> {
        if let Some(error) = self.error {
            return Ok(Err(ClientError::Server(error)));
        }
        match self.kind {
            Kind::Nothing => Ok(Ok(Answer::Done)),
            Kind::Read { data, runs, .. } => {
                let mut covered = 0; // runs are in order and do not overlap; neighbours may have stayed apart
                for (start, end) in runs {
                    if start != covered {
                        return Err(Violation::Coverage);
                    }
                    covered = end;
                }
                if covered == data.len() { Ok(Ok(Answer::Data(data))) } else { Err(Violation::Coverage) }
            }
            Kind::Status { found, .. } => Ok(Ok(Answer::Status(found))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_complete_when_every_byte_has_come_once_in_any_order() {
        let mut read = Expected::read(100, 10);
        for (offset, length) in [(104, 2), (100, 4), (108, 2), (106, 2)] {
            read.place(offset, length).expect("inside and new").fill(1);
        }
        match read.finish() {
            Ok(Ok(Answer::Data(data))) => assert_eq!(data, [1; 10]),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn data_outside_twice_or_missing_is_a_violation() {
        let mut read = Expected::read(100, 10);
        assert!(read.place(99, 2).is_err());
        assert!(read.place(108, 3).is_err());
        assert!(read.place(u64::MAX, 2).is_err());
        assert!(read.place(100, usize::MAX).is_err());
        assert!(read.place(105, 0).is_err());
        assert!(read.place(102, 4).is_ok());
        for (offset, length) in [(102, 4), (100, 3), (105, 2), (103, 1), (100, 10)] {
            assert!(read.place(offset, length).is_err(), "{offset} {length}");
        }
        assert!(matches!(read.finish(), Err(Violation::Coverage)));
    }

    #[test]
    fn an_error_wins_over_data() {
        let mut read = Expected::read(0, 4);
        assert!(read.place(0, 4).is_ok());
        read.fail(Errno::Io);
        assert!(matches!(read.finish(), Ok(Err(ClientError::Server(Errno::Io)))));
    }
}
