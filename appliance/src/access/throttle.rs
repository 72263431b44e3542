//! Failed logins are counted by the address they come from. After [`FAILURES_MAX`] within [`WINDOW`] the address is not
//! listened to any more until the window is over, whatever token it shows.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many failures an address has. A client with a mistyped token has some; nobody guesses 256 bits with them.
pub const FAILURES_MAX: u32 = 10;
/// How long failures count, from the first on.
pub const WINDOW: Duration = Duration::from_secs(60);
/// How many addresses are remembered: who has more of them than this is not stopped by counting.
const ADDRESSES_MAX: usize = 10_000;

#[derive(Debug, Clone, Copy)]
struct Failures {
    since: Instant,
    count: u32,
}

/// Counts failed logins.
#[derive(Debug, Default)]
pub struct Throttle {
    failures: Mutex<HashMap<IpAddr, Failures>>,
}

/// What counts as one address: of version 6 a network of 64 bits, since one customer has at least that.
fn address(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(six) => IpAddr::V6(Ipv6Addr::from_bits(six.to_bits() & !u128::from(u64::MAX))),
        four => four,
    }
}

impl Throttle {
    /// How long `peer` still has to wait, if it has failed too often.
    pub fn wait(&self, peer: IpAddr, now: Instant) -> Option<Duration> {
        let failures = self.lock();
        let found = failures.get(&address(peer)).filter(|found| found.count >= FAILURES_MAX)?;
        WINDOW.checked_sub(now.saturating_duration_since(found.since)).filter(|left| !left.is_zero())
    }

    /// Counts a failure of `peer`. Returns whether it is the one that was too many.
    pub fn fail(&self, peer: IpAddr, now: Instant) -> bool {
        let mut failures = self.lock();
        let over = |failures: &Failures| now.saturating_duration_since(failures.since) >= WINDOW;
        if failures.len() >= ADDRESSES_MAX {
            failures.retain(|_, failures| !over(failures));
        }
        let address = address(peer);
        if failures.len() >= ADDRESSES_MAX && !failures.contains_key(&address) {
            let oldest = failures.iter().min_by_key(|(_, failures)| failures.since).map(|(address, _)| *address);
            oldest.and_then(|oldest| failures.remove(&oldest));
        }
        let entry = failures.entry(address).or_insert(Failures { since: now, count: 0 });
        if over(entry) {
            *entry = Failures { since: now, count: 0 };
        }
        entry.count = entry.count.saturating_add(1);
        entry.count == FAILURES_MAX
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<IpAddr, Failures>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_that_fails_too_often_waits_until_its_window_is_over() {
        let (throttle, begin) = (Throttle::default(), Instant::now());
        let (peer, other) = (ip("192.0.2.7"), ip("192.0.2.8"));
        for nth in 1..FAILURES_MAX {
            assert!(!throttle.fail(peer, begin), "{nth}");
            assert_eq!(throttle.wait(peer, begin), None);
        }
        assert!(throttle.fail(peer, begin + Duration::from_secs(10)));
        assert_eq!(throttle.wait(peer, begin + Duration::from_secs(20)), Some(Duration::from_secs(40)));
        assert_eq!(throttle.wait(ip("::ffff:192.0.2.7"), begin), Some(WINDOW));
        assert_eq!(throttle.wait(other, begin), None);
        assert_eq!(throttle.wait(peer, begin + WINDOW), None);
        assert!(!throttle.fail(peer, begin + WINDOW), "a new window begins with one failure");
        assert_eq!(throttle.wait(peer, begin + WINDOW), None);
    }

    #[test]
    fn a_network_of_version_six_counts_as_one_address() {
        let (throttle, now) = (Throttle::default(), Instant::now());
        for host in 0..FAILURES_MAX {
            throttle.fail(ip(&format!("2001:db8::{host:x}")), now);
        }
        assert!(throttle.wait(ip("2001:db8::ffff"), now).is_some());
        assert!(throttle.wait(ip("2001:db8:0:1::"), now).is_none());
    }

    #[test]
    fn many_addresses_take_bounded_memory() {
        let (throttle, now) = (Throttle::default(), Instant::now());
        for number in 0..20_000_u32 {
            throttle.fail(IpAddr::from(number.to_be_bytes()), now + Duration::from_millis(u64::from(number)));
        }
        assert!(throttle.lock().len() <= ADDRESSES_MAX);
    }
}
