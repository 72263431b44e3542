//! [`Image`]: the bytes of one simulated file, sparse, its pages shared between copies until one is written.

use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) const PAGE: u64 = 4096;
const PAGE_LEN: usize = 4096;

/// Unit in which a write is torn by a power cut.
const SECTOR: u64 = 512;

#[derive(Debug, Clone, Default)]
pub(crate) struct Image {
    pages: BTreeMap<u64, Arc<[u8; PAGE_LEN]>>,
    len: u64,
}

/// One change that no sync has covered yet.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Write { offset: u64, data: Arc<[u8]> },
    SetLen(u64),
    Punch { offset: u64, length: u64 },
}

/// Splits a range at page borders: (page, offset in it, length).
fn pieces(offset: u64, length: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let end = offset.saturating_add(length);
    let mut at = offset;
    std::iter::from_fn(move || {
        let step = (PAGE - at % PAGE).min(end.checked_sub(at)?);
        let piece = (at / PAGE, small(at % PAGE), small(step));
        at += step;
        (step > 0).then_some(piece)
    })
}

fn small(value: u64) -> usize {
    usize::try_from(value).expect("a page offset or a buffer length fits usize")
}

impl Image {
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn page_count(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Fills `buf`; what lies past the end reads as zeroes.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) {
        let mut rest = buf;
        for (page, start, length) in pieces(offset, rest.len() as u64) {
            let (head, tail) = rest.split_at_mut(length);
            match self.pages.get(&page) {
                Some(bytes) => head.copy_from_slice(&bytes[start..start + length]),
                None => head.fill(0),
            }
            rest = tail;
        }
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let mut rest = data;
        for (page, start, length) in pieces(offset, data.len() as u64) {
            let (head, tail) = rest.split_at(length);
            let bytes = Arc::make_mut(self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE_LEN])));
            bytes[start..start + length].copy_from_slice(head);
            rest = tail;
        }
        if !data.is_empty() {
            self.len = self.len.max(offset + data.len() as u64);
        }
    }

    /// How many bytes from `offset` can be written with `free` new pages.
    pub(crate) fn writable(&self, offset: u64, length: u64, mut free: u64) -> u64 {
        let mut done = 0;
        for (page, _, piece) in pieces(offset, length) {
            if !self.pages.contains_key(&page) {
                if free == 0 {
                    return done;
                }
                free -= 1;
            }
            done += piece as u64;
        }
        done
    }

    pub(crate) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
        }
        self.len = len;
    }

    pub(crate) fn punch(&mut self, offset: u64, length: u64) {
        self.zero(offset, length.min(self.len.saturating_sub(offset)));
    }

    /// Zeroes a range: whole pages vanish, edges are overwritten.
    fn zero(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length);
        let touched: Vec<u64> = self.pages.range(offset / PAGE..end.div_ceil(PAGE)).map(|(page, _)| *page).collect();
        for page in touched {
            let from = offset.max(page * PAGE) - page * PAGE;
            let to = end.min((page + 1) * PAGE) - page * PAGE;
            // Past the end of the file a page is all zeroes, so a punch up to the end takes the whole page.
            if from == 0 && (to == PAGE || page * PAGE + to >= self.len) {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                Arc::make_mut(bytes)[small(from)..small(to)].fill(0);
            }
        }
    }

    pub(crate) fn apply(&mut self, change: &Change) {
        match change {
            Change::Write { offset, data } => self.write(*offset, data),
            Change::SetLen(len) => self.set_len(*len),
            Change::Punch { offset, length } => self.punch(*offset, *length),
        }
    }

    /// Applies what `random` lets a power cut leave of `change`: all, nothing, or any of its sectors.
    pub(crate) fn apply_torn(&mut self, change: &Change, random: &mut super::random::Random) {
        match (random.below(4), change) {
            (0, _) => self.apply(change),
            (1, _) | (2 | 3, Change::SetLen(_)) if random.coin() => {}
            (_, Change::SetLen(len)) => self.set_len(*len),
            (_, Change::Write { offset, data }) => {
                let mut rest: &[u8] = data;
                let mut at = *offset;
                while !rest.is_empty() {
                    let (sector, tail) = rest.split_at(small(SECTOR - at % SECTOR).min(rest.len()));
                    if random.coin() {
                        self.write(at, sector);
                    }
                    at += sector.len() as u64;
                    rest = tail;
                }
                if random.coin() {
                    self.len = self.len.max(at); // the length went out, the sectors did not
                }
            }
            (_, Change::Punch { offset, length }) => {
                let first = random.below(length / SECTOR + 1) * SECTOR;
                let last = random.below(length / SECTOR + 1) * SECTOR;
                self.punch(offset + first.min(last), first.max(last) - first.min(last));
            }
        }
    }
}
