//! [`GrainMap`]: the state of every grain, two bits each, in pages that exist only where states are mixed.
//!
//! Readers and writers take one page's lock for nanoseconds; nothing here waits for I/O. A disk that nobody wrote to
//! costs 24 bytes per 64 MiB, one written all over 4 KiB per 64 MiB.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

/// Where a grain reads from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The recovery point.
    Base,
    /// The data file.
    Data,
    /// Nowhere: zeroes.
    Zero,
}

/// Two-bit lanes in a word: base 00, data 01, zero 10.
const DATA_LANES: u64 = 0x5555_5555_5555_5555;
const ZERO_LANES: u64 = DATA_LANES << 1;
const LANES: u64 = 32;
const WORDS: usize = 512;
const PAGE: u64 = LANES * 512;

impl State {
    /// A word with all lanes in this state.
    fn word(self) -> u64 {
        match self {
            State::Base => 0,
            State::Data => DATA_LANES,
            State::Zero => ZERO_LANES,
        }
    }

    fn from_lane(word: u64, lane: u64) -> State {
        match (word >> (2 * lane)) & 3 {
            0 => State::Base,
            1 => State::Data,
            _ => State::Zero,
        }
    }
}

#[derive(Debug)]
enum Page {
    Uniform(State),
    Mixed(Box<[u64; WORDS]>),
}

#[derive(Debug)]
pub(super) struct GrainMap {
    pages: Box<[RwLock<Page>]>,
    grains: u64,
    data_grains: AtomicU64,
    zero_grains: AtomicU64,
}

/// How many grains of a range were in which state.
#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    data: u64,
    zero: u64,
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("a page number fits usize: the pages are in memory")
}

impl GrainMap {
    /// All grains of a disk in [`State::Base`].
    pub(super) fn new(grains: u64) -> GrainMap {
        let pages = (0..grains.div_ceil(PAGE)).map(|_| RwLock::new(Page::Uniform(State::Base))).collect();
        GrainMap { pages, grains, data_grains: AtomicU64::new(0), zero_grains: AtomicU64::new(0) }
    }

    pub(super) fn grains(&self) -> u64 {
        self.grains
    }

    pub(super) fn data_grains(&self) -> u64 {
        self.data_grains.load(Ordering::Relaxed)
    }

    pub(super) fn zero_grains(&self) -> u64 {
        self.zero_grains.load(Ordering::Relaxed)
    }

    pub(super) fn state(&self, grain: u64) -> State {
        match &*self.pages[index(grain / PAGE)].read().unwrap_or_else(PoisonError::into_inner) {
            Page::Uniform(state) => *state,
            Page::Mixed(words) => State::from_lane(words[index(grain % PAGE / LANES)], grain % LANES),
        }
    }

    /// The runs of equal state in a range, each as long as possible, found as the caller asks for them.
    pub(super) fn runs(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, State)> {
        let end = range.end.min(self.grains);
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let start = at;
            let state = self.state(at);
            while at < end {
                let page_end = (at / PAGE + 1) * PAGE;
                let stop = page_end.min(end);
                at = self.same_until(at, stop, state);
                if at < stop {
                    break;
                }
            }
            // Another thread may have changed the first grain between the two looks.
            at = at.max(start + 1);
            Some((start..at, state))
        })
    }

    /// The first grain in `at..stop`, all in one page, that is not in `state`, or `stop`.
    fn same_until(&self, mut at: u64, stop: u64, state: State) -> u64 {
        match &*self.pages[index(at / PAGE)].read().unwrap_or_else(PoisonError::into_inner) {
            Page::Uniform(uniform) => {
                if *uniform == state {
                    stop
                } else {
                    at
                }
            }
            Page::Mixed(words) => {
                while at < stop {
                    let lane = at % LANES;
                    let differs = (words[index(at % PAGE / LANES)] ^ state.word()) >> (2 * lane);
                    if differs != 0 {
                        return stop.min(at + u64::from(differs.trailing_zeros()) / 2);
                    }
                    at += LANES - lane;
                }
                stop
            }
        }
    }

    /// Puts a range into `state`; says whether any grain was in another.
    pub(super) fn set(&self, range: Range<u64>, state: State) -> bool {
        let mut before = Tally::default();
        let mut at = range.start;
        let end = range.end.min(self.grains);
        while at < end {
            let page_start = at / PAGE * PAGE;
            let stop = (page_start + PAGE).min(end);
            let tally = self.set_in_page(at, stop, state);
            before.data += tally.data;
            before.zero += tally.zero;
            at = stop;
        }
        let count = end.saturating_sub(range.start);
        let (data, zero) = match state {
            State::Base => (0, 0),
            State::Data => (count, 0),
            State::Zero => (0, count),
        };
        // The sum is exact whatever other threads do in between; wrapping additions commute.
        self.data_grains.fetch_add(data.wrapping_sub(before.data), Ordering::Relaxed);
        self.zero_grains.fetch_add(zero.wrapping_sub(before.zero), Ordering::Relaxed);
        let same = match state {
            State::Base => count - before.data - before.zero,
            State::Data => before.data,
            State::Zero => before.zero,
        };
        same != count
    }

    fn set_in_page(&self, at: u64, stop: u64, state: State) -> Tally {
        let page_start = at / PAGE * PAGE;
        let whole = at == page_start && stop == (page_start + PAGE).min(self.grains);
        let mut page = self.pages[index(at / PAGE)].write().unwrap_or_else(PoisonError::into_inner);
        let before = match &mut *page {
            Page::Uniform(uniform) => {
                let before = match uniform {
                    State::Base => Tally::default(),
                    State::Data => Tally { data: stop - at, zero: 0 },
                    State::Zero => Tally { data: 0, zero: stop - at },
                };
                if *uniform != state && !whole {
                    let mut words = Box::new([uniform.word(); WORDS]);
                    set_words(&mut words, at, stop, state);
                    *page = Page::Mixed(words);
                }
                before
            }
            Page::Mixed(words) => set_words(words, at, stop, state),
        };
        if whole {
            *page = Page::Uniform(state);
        }
        before
    }
}

fn set_words(words: &mut [u64; WORDS], mut at: u64, stop: u64, state: State) -> Tally {
    let mut before = Tally::default();
    while at < stop {
        let lane = at % LANES;
        let count = (LANES - lane).min(stop - at);
        let mask = (u64::MAX >> (64 - 2 * count)) << (2 * lane);
        let word = &mut words[index(at % PAGE / LANES)];
        before.data += u64::from((*word & mask & DATA_LANES).count_ones());
        before.zero += u64::from((*word & mask & ZERO_LANES).count_ones());
        *word = (*word & !mask) | (state.word() & mask);
        at += count;
    }
    before
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn states() -> impl Strategy<Value = State> {
        prop_oneof![Just(State::Data), Just(State::Zero), Just(State::Base)]
    }

    proptest! {
        #[test]
        fn a_map_agrees_with_a_list_of_states(
            grains in 1..3 * PAGE,
            sets in prop::collection::vec((0..3 * PAGE, 0..2 * PAGE, states()), 0..20),
            look in (0..3 * PAGE, 0..3 * PAGE),
        ) {
            let map = GrainMap::new(grains);
            let mut model = vec![State::Base; index(grains)];
            for (start, length, state) in sets {
                let range = start.min(grains)..(start + length).min(grains);
                let part = &mut model[index(range.start)..index(range.end)];
                prop_assert_eq!(map.set(range, state), part.iter().any(|old| *old != state));
                part.fill(state);
            }
            let count = |state| model.iter().filter(|found| **found == state).count() as u64;
            prop_assert_eq!((map.data_grains(), map.zero_grains()), (count(State::Data), count(State::Zero)));
            let (start, end) = (look.0.min(look.1).min(grains), look.0.max(look.1).min(grains));
            let mut at = start;
            let mut last = None;
            for (run, state) in map.runs(start..end) {
                prop_assert_eq!(run.start, at);
                prop_assert!(run.end > at && last != Some(state));
                prop_assert!(model[index(run.start)..index(run.end)].iter().all(|found| *found == state));
                (at, last) = (run.end, Some(state));
            }
            prop_assert_eq!(at, end);
        }
    }

    #[test]
    fn whole_pages_cost_nothing() {
        let map = GrainMap::new(1 << 28);
        assert!(map.set(0..1 << 28, State::Zero));
        assert!(map.pages.iter().all(|page| matches!(*page.read().unwrap(), Page::Uniform(State::Zero))));
        assert_eq!(map.runs(5..1 << 28).collect::<Vec<_>>(), [(5..1 << 28, State::Zero)]);
    }
}
