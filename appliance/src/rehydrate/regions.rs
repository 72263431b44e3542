//! [`Regions`]: which parts of a disk are on production storage already. The rules: docs/design/rehydration.md

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a region: what is copied, and proven, at once.
pub const REGION: u64 = 64 << 10;

const WORD: u64 = 64;

/// A set of regions that several threads change.
#[derive(Debug)]
pub struct RegionSet {
    words: Vec<AtomicU64>,
    regions: u64,
}

impl RegionSet {
    /// An empty set for a disk of `size` bytes.
    pub fn new(size: u64) -> RegionSet {
        let count = size.div_ceil(REGION);
        let words = (0..count.div_ceil(WORD)).map(|_| AtomicU64::new(0)).collect();
        RegionSet { words, regions: count }
    }

    /// A set from its bytes, little-endian words as [`RegionSet::to_bytes`] gives them; `None` if they are not for a
    /// disk of `size` bytes.
    pub fn from_bytes(size: u64, bytes: &[u8]) -> Option<RegionSet> {
        let mut set = RegionSet::new(size);
        let (words, rest) = bytes.as_chunks::<8>();
        if words.len() != set.words.len() || !rest.is_empty() {
            return None;
        }
        set.words = words.iter().map(|word| AtomicU64::new(u64::from_le_bytes(*word))).collect();
        let tail = set.regions % WORD;
        if tail != 0 && set.words.last().is_some_and(|word| word.load(Ordering::Relaxed) >> tail != 0) {
            return None;
        }
        Some(set)
    }

    /// The set's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.load(Ordering::Acquire).to_le_bytes()).collect()
    }

    /// Number of regions of the disk.
    pub fn regions(&self) -> u64 {
        self.regions
    }

    /// Number of regions in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }

    /// Whether a region is in the set.
    pub fn contains(&self, region: u64) -> bool {
        let (word, bit) = place(region);
        self.words.get(word).is_some_and(|word| word.load(Ordering::Acquire) & bit != 0)
    }

    /// Puts a region in.
    pub fn insert(&self, region: u64) {
        let (word, bit) = place(region);
        if let Some(word) = self.words.get(word) {
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// Takes a region out; true if it was there.
    pub fn remove(&self, region: u64) -> bool {
        let (word, bit) = place(region);
        self.words.get(word).is_some_and(|word| word.fetch_and(!bit, Ordering::AcqRel) & bit != 0)
    }

    /// Puts all regions in.
    pub fn fill(&self) {
        for (at, word) in self.words.iter().enumerate() {
            let left = self.regions - at as u64 * WORD;
            word.store(if left >= WORD { u64::MAX } else { (1 << left) - 1 }, Ordering::Release);
        }
    }

    /// The first region at or after `from`.
    pub fn next(&self, from: u64) -> Option<u64> {
        let (first, _) = place(from);
        let mut mask = u64::MAX << (from % WORD);
        for (at, word) in self.words.iter().enumerate().skip(first) {
            let found = word.load(Ordering::Acquire) & mask;
            if found != 0 {
                return Some(at as u64 * WORD + u64::from(found.trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }
}

fn place(region: u64) -> (usize, u64) {
    (usize::try_from(region / WORD).unwrap_or(usize::MAX), 1 << (region % WORD))
}

/// The regions that a range of bytes touches.
pub fn touched(offset: u64, length: u64) -> Range<u64> {
    if length == 0 { 0..0 } else { offset / REGION..offset.saturating_add(length).div_ceil(REGION) }
}

/// Where every region of a disk stands: open, copied or proven.
#[derive(Debug)]
pub struct Regions {
    open: RegionSet,
    unproven: RegionSet,
    /// Copied to the end at least once since they were last open. What the guest changes stays in here: a restart sees
    /// such regions in the overlay.
    written: RegionSet,
}

impl Regions {
    /// Every region is open.
    pub fn all_open(size: u64) -> Regions {
        let regions =
            Regions { open: RegionSet::new(size), unproven: RegionSet::new(size), written: RegionSet::new(size) };
        regions.open.fill();
        regions.unproven.fill();
        regions
    }

    /// Regions of `written` are copied, the others open. None is proven.
    pub fn resumed(size: u64, written: RegionSet) -> Regions {
        let regions = Regions { written, ..Regions::all_open(size) };
        let mut at = 0;
        while let Some(region) = regions.written.next(at) {
            regions.open.remove(region);
            at = region + 1;
        }
        regions
    }

    /// The guest has changed a range. Called after the change is in the overlay and before it is answered.
    pub fn changed(&self, offset: u64, length: u64) {
        for region in touched(offset, length) {
            // Always a read-modify-write: either a copier's comes later and sees the change, or it came earlier and the
            // region is open again.
            self.open.insert(region);
            self.unproven.insert(region);
        }
    }

    /// Takes the first open region at or after `from` to be copied: it counts as copied from now on.
    pub fn take_open(&self, from: u64) -> Option<u64> {
        let mut at = from;
        loop {
            let region = self.open.next(at)?;
            if self.take(region) {
                return Some(region);
            }
            at = region;
        }
    }

    /// Takes this region if it is open.
    pub fn take(&self, region: u64) -> bool {
        let taken = self.open.remove(region);
        if taken {
            self.written.remove(region);
            self.unproven.insert(region);
        }
        taken
    }

    /// The copy of a region that was taken is complete.
    pub fn copied(&self, region: u64) {
        self.written.insert(region);
    }

    /// A copy or comparison that failed: the region is open again.
    pub fn reopen(&self, region: u64) {
        self.written.remove(region);
        self.unproven.insert(region);
        self.open.insert(region);
    }

    /// A comparison that failed although nothing is to be copied again: it is to be repeated.
    pub fn unprove(&self, region: u64) {
        self.unproven.insert(region);
    }

    /// Takes the first copied but unproven region at or after `from` to be compared: it counts as proven from now on,
    /// unless the guest writes to it or the comparison reopens it.
    pub fn take_unproven(&self, from: u64) -> Option<u64> {
        let mut at = from;
        loop {
            let region = self.unproven.next(at)?;
            if self.open.contains(region) {
                at = region + 1;
            } else if self.unproven.remove(region) {
                return Some(region);
            } else {
                at = region;
            }
        }
    }

    /// Takes this region if it is copied and unproven.
    pub fn take_to_prove(&self, region: u64) -> bool {
        !self.open.contains(region) && self.unproven.remove(region)
    }

    /// Number of regions of the disk.
    pub fn total(&self) -> u64 {
        self.open.regions()
    }

    /// Number of open regions.
    pub fn open(&self) -> u64 {
        self.open.count()
    }

    /// Whether a region is open.
    pub fn is_open(&self, region: u64) -> bool {
        self.open.contains(region)
    }

    /// Number of regions that are open or not proven.
    pub fn unproven(&self) -> u64 {
        self.unproven.count()
    }

    /// The regions whose copy is complete, as bytes for [`RegionSet::from_bytes`]; regions in flight are not among
    /// them.
    pub fn written(&self) -> Vec<u8> {
        self.written.to_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_set_has_each_region_once_and_ends() {
        for regions in [1, 63, 64, 65, 200] {
            let set = RegionSet::new(regions * REGION - 1);
            set.fill();
            assert_eq!(set.count(), regions);
            let mut seen = Vec::new();
            let mut at = 0;
            while let Some(region) = set.next(at) {
                seen.push(region);
                at = region + 1;
            }
            assert_eq!(seen, (0..regions).collect::<Vec<_>>());
            assert_eq!(RegionSet::from_bytes(regions * REGION, &set.to_bytes()).unwrap().count(), regions);
        }
    }

    #[test]
    fn bytes_of_another_disk_are_refused() {
        let set = RegionSet::new(65 * REGION);
        set.fill();
        assert!(RegionSet::from_bytes(64 * REGION, &set.to_bytes()).is_none());
        assert!(RegionSet::from_bytes(66 * REGION, &set.to_bytes()).is_some());
        assert!(RegionSet::from_bytes(65 * REGION, &[0xff; 16]).is_none());
        assert!(RegionSet::from_bytes(65 * REGION, &[0; 15]).is_none());
    }

    #[test]
    fn a_write_while_a_region_is_copied_or_compared_leaves_it_open() {
        let regions = Regions::all_open(3 * REGION);
        assert_eq!(regions.take_open(0), Some(0));
        regions.changed(REGION - 1, 1);
        assert_eq!(regions.take_open(0), Some(0));
        assert_eq!(regions.take_unproven(0), Some(0));
        regions.changed(0, 1);
        assert_eq!((regions.open(), regions.unproven()), (3, 3));
    }

    #[test]
    fn open_regions_are_not_compared() {
        let regions = Regions::all_open(2 * REGION);
        assert_eq!(regions.take_unproven(0), None);
        assert!(regions.take(1));
        assert!(!regions.take(1));
        assert_eq!(regions.take_unproven(0), Some(1));
        assert_eq!(regions.take_unproven(0), None);
        assert_eq!((regions.open(), regions.unproven()), (1, 1));
    }

    #[test]
    fn what_was_copied_before_a_restart_is_not_open_but_unproven() {
        let before = Regions::all_open(5 * REGION);
        for region in [1, 3, 4] {
            before.take(region);
        }
        before.copied(1);
        before.copied(4);
        let written = RegionSet::from_bytes(5 * REGION, &before.written()).unwrap();
        let after = Regions::resumed(5 * REGION, written);
        assert_eq!((after.open(), after.unproven()), (3, 5));
        assert!(!after.take(1) && !after.take(4) && after.take(3));
    }

    #[test]
    fn a_range_touches_every_region_it_has_a_byte_in() {
        assert_eq!(touched(0, 0), 0..0);
        assert_eq!(touched(REGION, 0), 0..0);
        assert_eq!(touched(REGION - 1, 2), 0..2);
        assert_eq!(touched(REGION, REGION), 1..2);
    }
}
