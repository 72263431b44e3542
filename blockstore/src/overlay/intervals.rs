//! [`Intervals`]: a set of grains as disjoint ranges, neighbours merged.

use std::collections::BTreeMap;
use std::ops::Range;

#[derive(Debug, Default)]
pub(super) struct Intervals {
    ends: BTreeMap<u64, u64>, // start -> end
}

impl Intervals {
    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub(super) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        if let Some((before, before_end)) = self.ends.range_mut(..=start).next_back() {
            if *before_end >= end {
                return;
            }
            if *before_end >= start {
                start = *before;
            }
        }
        while let Some((next, next_end)) = self.ends.range(start..=end).next().map(|(next, end)| (*next, *end)) {
            self.ends.remove(&next);
            end = end.max(next_end);
        }
        self.ends.insert(start, end);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        self.ends.iter().map(|(start, end)| *start..*end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn intervals_hold_what_was_inserted_in_as_few_ranges_as_possible(
            ranges in prop::collection::vec((0u64..200, 0u64..30), 0..40)
        ) {
            let mut set = Intervals::default();
            let mut model = vec![false; 256];
            for (start, length) in ranges {
                set.insert(start..start + length);
                model[usize::try_from(start).unwrap()..][..usize::try_from(length).unwrap()].fill(true);
            }
            let mut found = vec![false; 256];
            let mut last = None;
            for range in set.iter() {
                prop_assert!(last.is_none_or(|end| end < range.start), "merged and in order");
                last = Some(range.end);
                range.for_each(|grain| found[usize::try_from(grain).unwrap()] = true);
            }
            prop_assert_eq!(set.is_empty(), last.is_none());
            prop_assert_eq!(found, model);
        }
    }
}
