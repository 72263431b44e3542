//! The clock that policies go by: the host's, or for a rehearsal one that runs faster from its beginning on.

use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};

/// A clock.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    begin: (Instant, DateTime<Utc>),
    speed: u32,
}

impl Clock {
    /// One that runs `speed` times as fast as the host's.
    pub fn new(speed: u32) -> Clock {
        Clock { begin: (Instant::now(), Utc::now()), speed: speed.max(1) }
    }

    /// What it shows.
    pub fn now(&self) -> DateTime<Utc> {
        if self.speed == 1 {
            return Utc::now(); // which may be set
        }
        let passed = self.begin.0.elapsed().saturating_mul(self.speed);
        TimeDelta::from_std(passed)
            .ok()
            .and_then(|passed| self.begin.1.checked_add_signed(passed))
            .unwrap_or(self.begin.1)
    }

    /// How long `length` of it takes.
    pub fn real(&self, length: Duration) -> Duration {
        length / self.speed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fast_clock_makes_hours_of_seconds() {
        let clock = Clock::new(3600);
        assert_eq!(clock.real(Duration::from_secs(7200)), Duration::from_secs(2));
        let before = clock.now();
        std::thread::sleep(Duration::from_millis(20));
        assert!(clock.now() - before >= TimeDelta::seconds(72));
        assert!((Clock::new(0).now() - Utc::now()).num_seconds().abs() < 60);
    }
}
