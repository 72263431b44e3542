//! [`MemoryExport`]: a RAM disk with holes, for tests and benchmarks. It keeps nothing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use bytes::{Bytes, BytesMut};

use crate::export::{BlockSize, ContextExtent, Export, ExportError, Extent, ExtentKind, Piece, ZeroMode};

/// Pages are kept and given up in this unit.
const PAGE: u64 = 64 << 10;

/// Locks the disk is spread over, so that connections do not meet on one.
const SHARDS: usize = 64;

/// Name of the metadata context in which a [`MemoryExport`] tells which pages were ever written: flag 1.
pub const WRITTEN_CONTEXT: &str = "memory:written";

/// A disk in memory. Pages that were never written, or were trimmed or zeroed whole, are holes and take no space.
///
/// Every read is resident, and pages are shared with the replies that carry them: a write to a page that a reply still
/// holds copies the page first.
pub struct MemoryExport {
    size: u64,
    shards: Vec<RwLock<BTreeMap<u64, Page>>>,
    read_only: bool,
    resident: bool,
    block_size: BlockSize,
    flushes: AtomicU64,
}

#[derive(Clone)]
struct Page(Bytes);

impl MemoryExport {
    /// A disk that is one hole.
    pub fn new(size: u64) -> MemoryExport {
        MemoryExport {
            size,
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            read_only: false,
            resident: true,
            block_size: BlockSize { minimum: 1, preferred: 4096, maximum: crate::limits::MAX_PAYLOAD },
            flushes: AtomicU64::new(0),
        }
    }

    /// A disk with this content; pages of zeroes become holes.
    pub fn from_bytes(content: &[u8]) -> MemoryExport {
        let disk = MemoryExport::new(content.len() as u64);
        for (number, page) in (0..).zip(content.chunks(PAGE_LEN)) {
            if page.iter().any(|&byte| byte != 0) {
                let mut whole = BytesMut::zeroed(PAGE_LEN);
                whole.split_at_mut(page.len()).0.copy_from_slice(page);
                let mut shard = disk.shard(number).write().unwrap_or_else(PoisonError::into_inner);
                shard.insert(number, Page(whole.freeze()));
            }
        }
        disk
    }

    /// Refuses writes.
    pub fn read_only(mut self) -> MemoryExport {
        self.read_only = true;
        self
    }

    /// Answers no read and takes no write on the connection's own task, as an export does whose data is not in memory.
    pub fn not_resident(mut self) -> MemoryExport {
        self.resident = false;
        self
    }

    /// Other block size constraints.
    pub fn with_block_size(mut self, block_size: BlockSize) -> MemoryExport {
        self.block_size = block_size;
        self
    }

    /// How often it was flushed.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::SeqCst)
    }

    /// The whole content.
    pub fn content(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.pieces(0, self.size, |piece| match piece {
            Piece::Data(bytes) => out.extend_from_slice(&bytes),
            Piece::Hole(length) => out.resize(out.len() + usize::try_from(length).unwrap_or(usize::MAX), 0),
        });
        out
    }

    fn shard(&self, page: u64) -> &RwLock<BTreeMap<u64, Page>> {
        let at = usize::try_from(page % SHARDS as u64).unwrap_or(0);
        self.shards.get(at).expect("there are SHARDS of them")
    }

    fn page(&self, number: u64) -> Option<Bytes> {
        let shard = self.shard(number).read().unwrap_or_else(PoisonError::into_inner);
        shard.get(&number).map(|page| page.0.clone())
    }

    fn pieces(&self, offset: u64, length: u64, mut take: impl FnMut(Piece)) {
        for span in spans(offset, length) {
            take(match self.page(span.page) {
                Some(page) => Piece::Data(page.slice(span.start..span.end)),
                None => Piece::Hole(span.len()),
            });
        }
    }

    fn change(&self, span: &Span, change: impl FnOnce(&mut [u8])) {
        let mut shard = self.shard(span.page).write().unwrap_or_else(PoisonError::into_inner);
        let page = match shard.remove(&span.page) {
            None => BytesMut::zeroed(PAGE_LEN),
            Some(Page(bytes)) => bytes.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..])),
        };
        let mut page = page;
        if let Some(part) = page.get_mut(span.start..span.end) {
            change(part);
        }
        shard.insert(span.page, Page(page.freeze()));
    }

    fn punch(&self, offset: u64, length: u64) {
        for span in spans(offset, length) {
            let end = (span.page * PAGE + PAGE).min(self.size);
            if span.start == 0 && span.page * PAGE + span.end as u64 == end {
                self.shard(span.page).write().unwrap_or_else(PoisonError::into_inner).remove(&span.page);
            } else if self.page(span.page).is_some() {
                self.change(&span, |part| part.fill(0));
            }
        }
    }

    /// Runs of pages that are there, or are not.
    fn runs(&self, offset: u64, length: u64, limit: usize) -> Vec<(u64, bool)> {
        let mut runs: Vec<(u64, bool)> = Vec::new();
        for span in spans(offset, length) {
            let there = self.page(span.page).is_some();
            let full = runs.len() == limit;
            match runs.last_mut() {
                Some((length, kind)) if *kind == there => *length += span.len(),
                _ if full => break,
                _ => runs.push((span.len(), there)),
            }
        }
        runs
    }

    fn writable(&self) -> Result<(), ExportError> {
        if self.read_only { Err(ExportError::ReadOnly) } else { Ok(()) }
    }
}

const PAGE_LEN: usize = 64 << 10;

/// A part of a page.
struct Span {
    page: u64,
    start: usize,
    end: usize,
}

impl Span {
    fn len(&self) -> u64 {
        (self.end - self.start) as u64
    }
}

fn spans(offset: u64, length: u64) -> impl Iterator<Item = Span> {
    let end = offset.saturating_add(length);
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let page = at / PAGE;
        let next = end.min((page + 1).saturating_mul(PAGE));
        let within = |position: u64| usize::try_from(position - page * PAGE).unwrap_or(PAGE_LEN);
        let span = Span { page, start: within(at), end: within(next) };
        at = next;
        Some(span)
    })
}

impl Export for MemoryExport {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn description(&self) -> String {
        "a disk in memory".to_owned()
    }

    fn block_size(&self) -> BlockSize {
        self.block_size
    }

    fn read_resident(&self, offset: u64, length: u32, pieces: &mut Vec<Piece>) -> bool {
        if self.resident {
            self.pieces(offset, u64::from(length), |piece| pieces.push(piece));
        }
        self.resident
    }

    fn read(&self, offset: u64, length: u32, pieces: &mut Vec<Piece>) -> Result<(), ExportError> {
        self.pieces(offset, u64::from(length), |piece| pieces.push(piece));
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), ExportError> {
        self.writable()?;
        let mut rest = data;
        for span in spans(offset, data.len() as u64) {
            let (part, later) = rest.split_at_checked(span.end - span.start).ok_or(ExportError::Invalid)?;
            rest = later;
            self.change(&span, |page| page.copy_from_slice(part));
        }
        Ok(())
    }

    fn write_resident(&self, offset: u64, data: &[u8]) -> Option<Result<(), ExportError>> {
        self.resident.then(|| self.write(offset, data))
    }

    fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), ExportError> {
        self.writable()?;
        match mode {
            ZeroMode::MayPunch => self.punch(offset, length),
            ZeroMode::KeepAllocated => {
                spans(offset, length).for_each(|span| self.change(&span, |part| part.fill(0)));
            }
        }
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        self.writable()?;
        self.punch(offset, length);
        Ok(())
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn cache(&self, _offset: u64, _length: u64) -> Result<(), ExportError> {
        Ok(())
    }

    fn fast_zeroes(&self) -> bool {
        true
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, ExportError> {
        let kind = |there| if there { ExtentKind::Data } else { ExtentKind::Hole };
        Ok(self
            .runs(offset, length, limit)
            .iter()
            .map(|&(length, there)| Extent { length, kind: kind(there) })
            .collect())
    }

    fn contexts(&self) -> Vec<String> {
        vec![WRITTEN_CONTEXT.to_owned()]
    }

    fn context_extents(
        &self,
        _context: &str,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<Vec<ContextExtent>, ExportError> {
        let extent = |&(length, there): &(u64, bool)| ContextExtent { length, flags: u32::from(there) };
        Ok(self.runs(offset, length, limit).iter().map(extent).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_read_back_and_zeroed_pages_become_holes() {
        let disk = MemoryExport::new(3 * PAGE + 100);
        disk.write(PAGE - 2, b"abcd").expect("in range");
        let content = disk.content();
        assert_eq!(content.len() as u64, disk.size());
        assert_eq!(content.get(PAGE_LEN - 3..PAGE_LEN + 3), Some(&b"\0abcd\0"[..]));
        assert_eq!(disk.runs(0, disk.size, 9), [(2 * PAGE, true), (PAGE + 100, false)]);
        disk.write_zeroes(0, PAGE, ZeroMode::MayPunch).expect("in range");
        assert_eq!(disk.runs(0, disk.size, 1), [(PAGE, false)]);
        disk.write_zeroes(0, 10, ZeroMode::KeepAllocated).expect("in range");
        assert_eq!(disk.runs(0, disk.size, 1), [(2 * PAGE, true)]);
        disk.write(3 * PAGE, &[1; 100]).expect("the short last page");
        disk.trim(0, disk.size()).expect("in range");
        assert_eq!(disk.runs(0, disk.size, 9), [(disk.size, false)]);
    }

    #[test]
    fn a_reply_keeps_the_bytes_it_was_given() {
        let disk = MemoryExport::from_bytes(&[7; 100]);
        let mut pieces = Vec::new();
        assert!(disk.read_resident(0, 100, &mut pieces));
        disk.write(0, &[8; 100]).expect("in range");
        assert_eq!(pieces, [Piece::Data(Bytes::from_static(&[7; 100]))]);
        assert_eq!(disk.content(), [8; 100]);
    }
}
