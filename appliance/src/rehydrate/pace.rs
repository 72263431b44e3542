//! [`Pace`]: how fast may be copied, by what was asked for and by what the guest feels.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Slower than this it never gets because of the guest.
const FLOOR: u64 = 1 << 20;
/// As good as unlimited.
const CEILING: u64 = 8 << 30;
/// A guest whose requests take less than this is not disturbed, whatever they took before.
const UNFELT: Duration = Duration::from_millis(2);
/// Requests that take this many times what they took undisturbed are.
const FELT: u32 = 3;
/// Longest sleep before `stop` is looked at again.
const NAP: Duration = Duration::from_millis(50);

/// A rate that several threads keep to.
#[derive(Debug)]
pub struct Pace {
    /// Bytes a second asked for; 0 is unlimited.
    limit: AtomicU64,
    /// Bytes a second at present.
    rate: AtomicU64,
    /// When the next bytes may be copied.
    next: Mutex<Instant>,
    /// What the guest's requests take undisturbed, in microseconds; 0 while it is not known.
    calm: AtomicU64,
}

impl Pace {
    /// A pace of at most `limit` bytes a second.
    pub fn new(limit: Option<u64>) -> Pace {
        let limit = limit.unwrap_or(0);
        let rate = AtomicU64::new(ceiling(limit));
        Pace { limit: AtomicU64::new(limit), rate, next: Mutex::new(Instant::now()), calm: AtomicU64::new(0) }
    }

    /// No pace: as fast as it goes.
    pub fn unlimited() -> Pace {
        Pace::new(None)
    }

    /// Bytes a second at present; `None` is as fast as it goes.
    pub fn rate(&self) -> Option<u64> {
        Some(self.rate.load(Ordering::Relaxed)).filter(|rate| *rate < CEILING)
    }

    /// Waits until `bytes` may be copied, or `stop`.
    pub fn take(&self, bytes: u64, stop: &AtomicBool) {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate >= CEILING {
            return;
        }
        let begin = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let begin = (*next).max(Instant::now());
            // In nanoseconds; a run at the floor takes a second.
            *next = begin + Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / rate.max(1));
            begin
        };
        while let Some(left) = begin.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            std::thread::sleep(left.min(NAP));
        }
    }

    /// Tells the mean time of the guest's requests in the last window; slows down or speeds up.
    pub fn felt(&self, latency: Option<Duration>) {
        let rate = self.rate.load(Ordering::Relaxed);
        let faster = (rate + rate / 4).min(ceiling(self.limit.load(Ordering::Relaxed)));
        let Some(latency) = latency else {
            self.rate.store(faster, Ordering::Relaxed);
            return;
        };
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX).max(1);
        let calm = match self.calm.load(Ordering::Relaxed) {
            0 => micros,
            // It follows what is faster at once, and what is slower slowly.
            calm => micros.min(calm + calm / 50 + 1),
        };
        self.calm.store(calm, Ordering::Relaxed);
        let disturbed = latency > UNFELT && latency > Duration::from_micros(calm) * FELT;
        // From "unlimited" one halving is not felt: it begins where a busy disk is.
        let slower = (rate.min(512 << 20) / 2).max(FLOOR);
        self.rate.store(if disturbed { slower } else { faster }, Ordering::Relaxed);
    }
}

fn ceiling(limit: u64) -> u64 {
    if limit == 0 { CEILING } else { limit.max(1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disturbed_guest_slows_the_copy_and_a_calm_one_lets_it_go_on() {
        let pace = Pace::unlimited();
        pace.felt(Some(Duration::from_micros(500)));
        assert_eq!(pace.rate.load(Ordering::Relaxed), CEILING);
        for _ in 0..20 {
            pace.felt(Some(Duration::from_millis(50)));
        }
        assert_eq!(pace.rate.load(Ordering::Relaxed), FLOOR);
        for _ in 0..100 {
            pace.felt(Some(Duration::from_micros(400)));
        }
        assert_eq!(pace.rate.load(Ordering::Relaxed), CEILING);
    }

    #[test]
    fn a_slow_disk_is_not_taken_for_a_disturbed_one() {
        let pace = Pace::unlimited();
        for _ in 0..20 {
            pace.felt(Some(Duration::from_millis(20)));
        }
        assert_eq!(pace.rate.load(Ordering::Relaxed), CEILING);
    }

    #[test]
    fn a_limit_is_never_exceeded() {
        let pace = Pace::new(Some(10 << 20));
        for _ in 0..50 {
            pace.felt(None);
        }
        assert_eq!(pace.rate.load(Ordering::Relaxed), 10 << 20);
        let (began, stop) = (Instant::now(), AtomicBool::new(false));
        for _ in 0..5 {
            pace.take(1 << 20, &stop);
        }
        assert!(began.elapsed() >= Duration::from_millis(400));
    }

    #[test]
    fn a_stop_ends_the_waiting() {
        let pace = Pace::new(Some(1));
        let stop = AtomicBool::new(true);
        pace.take(1 << 30, &stop);
        pace.take(1 << 30, &stop);
    }
}
