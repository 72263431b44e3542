//! Random tests: numbers that repeat with their seed, and how many rounds to go.

use std::time::SystemTime;

/// The seed of this run: `LIFEBOAT_SEED`, else another one each time. A test that fails has to print it.
pub fn seed() -> u64 {
    let given = std::env::var("LIFEBOAT_SEED").ok();
    let given = given.map(|text| text.parse().unwrap_or_else(|_| panic!("LIFEBOAT_SEED is no number: {text}")));
    given.unwrap_or_else(|| {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::from(since.subsec_nanos()) ^ (since.as_secs() << 20) ^ u64::from(std::process::id())
    })
}

/// `brief` rounds, or `nightly` ones under `LIFEBOAT_NIGHTLY`; `LIFEBOAT_ROUNDS` asks for another number.
pub fn rounds(brief: u64, nightly: u64) -> u64 {
    let asked = std::env::var("LIFEBOAT_ROUNDS").ok().and_then(|text| text.parse().ok());
    asked.unwrap_or(if std::env::var_os("LIFEBOAT_NIGHTLY").is_some() { nightly } else { brief })
}

/// Numbers that look random; the same seed gives the same.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Begins with `seed`.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.number() % limit
    }

    /// An index of something with `length` elements.
    pub fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64)).unwrap_or(0)
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_its_numbers() {
        let (mut one, mut two) = (Random::new(5), Random::new(5));
        let numbers: Vec<u64> = (0..100).map(|_| one.below(1000)).collect();
        assert!(numbers.iter().all(|number| *number == two.below(1000)));
        assert!(numbers.iter().any(|number| *number != numbers[0]));
    }
}
