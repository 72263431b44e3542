//! When a policy is due: pure, without a clock. Cron patterns in a time zone, as [`croner`] reads them across changes of
//! the clock: what is due at a time that is left out is due right after it, and what is due at a time that comes twice is
//! due the first time. Pattern with `*` or `*/N` in minutes or hours go by the clock as it runs.

use std::time::Duration;

use chrono::{DateTime, Local, NaiveTime, TimeDelta, TimeZone, Timelike, Utc};
use chrono_tz::Tz;
use croner::Cron;
use croner::parser::{CronParser, Seconds};

/// The zone that a policy's times are meant in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zone {
    /// The host's.
    Local,
    /// A named one.
    Named(Tz),
}

/// What becomes of a time that passed while nothing ran.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Missed {
    /// It is made up for, once, as soon as possible.
    #[default]
    Run,
    /// It is skipped.
    Skip,
}

/// What becomes of a time that passes while the policy still runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Overlap {
    /// It is skipped.
    #[default]
    Skip,
    /// It is made up for, once, when the run has ended.
    Wait,
}

/// The hours of a day in which a run may begin; over midnight if it ends before it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    from: NaiveTime,
    to: NaiveTime,
}

/// A time that passed so recently is not missed: whoever looks does not look at that very instant.
const RECENT: TimeDelta = TimeDelta::seconds(90);

/// When a policy is due.
#[derive(Debug, Clone)]
pub struct Plan {
    pattern: Cron,
    /// The zone of pattern and window.
    pub zone: Zone,
    /// A run begins up to this much later, so that not all begin at once.
    pub jitter: Duration,
    /// When runs may begin; at any time if absent.
    pub window: Option<Window>,
    /// What becomes of missed times.
    pub missed: Missed,
    /// What becomes of times during a run.
    pub overlap: Overlap,
}

/// What is known of a policy's past.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Past {
    /// The last time that was run or skipped; that the policy came to be, at the beginning.
    pub handled: DateTime<Utc>,
    /// When the last run ended.
    pub ended: Option<DateTime<Utc>>,
}

/// What to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing before this time.
    Wait(DateTime<Utc>),
    /// Run for the time that was due then.
    Run(DateTime<Utc>),
    /// Handle the time that was due then by doing nothing.
    Skip(DateTime<Utc>, &'static str),
    /// The pattern has no further time.
    Never,
}

impl Plan {
    /// Reads a pattern of five fields.
    pub fn new(pattern: &str) -> Result<Plan, String> {
        let parser = CronParser::builder().seconds(Seconds::Disallowed).build();
        let pattern = parser.parse(pattern).map_err(|error| format!("`{pattern}` is not a schedule: {error}"))?;
        let (zone, missed, overlap) = (Zone::Local, Missed::default(), Overlap::default());
        Ok(Plan { pattern, zone, jitter: Duration::ZERO, window: None, missed, overlap })
    }

    /// The first time after `after` at which it is due.
    pub fn next(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self.zone {
            Zone::Local => next(&self.pattern, after, &Local),
            Zone::Named(zone) => next(&self.pattern, after, &zone),
        }
    }

    /// The last time before `before` at which it was due.
    fn previous(&self, before: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self.zone {
            Zone::Local => previous(&self.pattern, before, &Local),
            Zone::Named(zone) => previous(&self.pattern, before, &zone),
        }
    }

    /// The newest time, `least` or later, whose run may have begun by `now`: after a long absence there are too many to
    /// look at each.
    fn newest(&self, policy: &str, least: DateTime<Utc>, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let mut newest = self.previous(now.checked_add_signed(TimeDelta::seconds(1))?)?;
        while newest > least && self.opening(self.start(policy, newest)) > now {
            newest = self.previous(newest)?;
        }
        Some(newest.max(least))
    }

    /// When the run for `due` begins: later by a part of the jitter that depends on policy and time alone, so that it is
    /// the same after a restart.
    pub fn start(&self, policy: &str, due: DateTime<Utc>) -> DateTime<Utc> {
        let millis = u64::try_from(self.jitter.as_millis()).unwrap_or(u64::MAX);
        let digest = blake3::hash(format!("{policy} {}", due.timestamp()).as_bytes());
        let part = digest.as_bytes().iter().take(8).fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
        let late = TimeDelta::milliseconds(i64::try_from(part % millis.saturating_add(1)).unwrap_or(0));
        due.checked_add_signed(late).unwrap_or(due)
    }

    /// What to do at `now`. `running`: whether the policy runs.
    pub fn decide(&self, policy: &str, past: Past, running: bool, now: DateTime<Utc>) -> Verdict {
        let Some(due) = self.next(past.handled) else { return Verdict::Never };
        let begin = self.opening(self.start(policy, due));
        if now < begin {
            return Verdict::Wait(begin);
        }
        // A later time that has come too stands for this one.
        let later = self.next(due).filter(|later| self.opening(self.start(policy, *later)) <= now);
        if running {
            return match self.overlap {
                Overlap::Skip => Verdict::Skip(due, "the run before has not ended"),
                Overlap::Wait if later.is_some() => Verdict::Skip(due, "a later one waits for the run before"),
                Overlap::Wait => Verdict::Wait(now + TimeDelta::seconds(1)),
            };
        }
        if let Some(later) = later {
            let skipped = self.newest(policy, later, now).and_then(|newest| self.previous(newest)).unwrap_or(due);
            return Verdict::Skip(skipped.max(due), "it was missed, and a later one is due");
        }
        let waited_for_run = self.overlap == Overlap::Wait && past.ended.is_some_and(|ended| ended >= begin);
        if self.missed == Missed::Skip && !waited_for_run && now - begin > RECENT {
            return Verdict::Skip(due, "it was missed");
        }
        match self.window_opens(now) {
            Some(opens) => Verdict::Wait(opens),
            None => Verdict::Run(due),
        }
    }

    /// The first time from `time` on at which a run may begin.
    fn opening(&self, time: DateTime<Utc>) -> DateTime<Utc> {
        self.window_opens(time).unwrap_or(time)
    }

    /// When the window opens next, if it is closed at `time`.
    pub fn window_opens(&self, time: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let window = self.window?;
        match self.zone {
            Zone::Local => opens(window, time, &Local),
            Zone::Named(zone) => opens(window, time, &zone),
        }
    }
}

fn next<Z: TimeZone>(pattern: &Cron, after: DateTime<Utc>, zone: &Z) -> Option<DateTime<Utc>> {
    let found = pattern.find_next_occurrence(&after.with_timezone(zone), false).ok()?;
    // Going back would go on for ever.
    Some(found.to_utc()).filter(|found| *found > after)
}

fn previous<Z: TimeZone>(pattern: &Cron, before: DateTime<Utc>, zone: &Z) -> Option<DateTime<Utc>> {
    let found = pattern.find_previous_occurrence(&before.with_timezone(zone), false).ok()?;
    Some(found.to_utc()).filter(|found| *found < before)
}

fn opens<Z: TimeZone>(window: Window, time: DateTime<Utc>, zone: &Z) -> Option<DateTime<Utc>> {
    let mut at = time;
    if window.holds(at.with_timezone(zone).time()) {
        return None;
    }
    // Minute by minute for two days: clocks jump as they like.
    at = at.with_second(0).and_then(|at| at.with_nanosecond(0)).unwrap_or(at);
    for _ in 0..2 * 24 * 60 {
        at += TimeDelta::minutes(1);
        if window.holds(at.with_timezone(zone).time()) {
            return Some(at);
        }
    }
    Some(at)
}

impl Window {
    /// Reads `22:00-06:00`.
    pub fn parse(text: &str) -> Result<Window, String> {
        let bad = || format!("`{text}` is not a window; write 22:00-06:00");
        let (from, to) = text.split_once('-').ok_or_else(bad)?;
        let time = |text: &str| NaiveTime::parse_from_str(text.trim(), "%H:%M").map_err(|_| bad());
        let (from, to) = (time(from)?, time(to)?);
        if from == to { Err(bad()) } else { Ok(Window { from, to }) }
    }

    fn holds(self, time: NaiveTime) -> bool {
        match self.from < self.to {
            true => self.from <= time && time < self.to,
            false => self.from <= time || time < self.to,
        }
    }
}

impl Zone {
    /// Reads the name of a zone, as `Europe/Berlin`.
    pub fn parse(name: &str) -> Result<Zone, String> {
        let zone = name.parse::<Tz>().map(Zone::Named);
        zone.map_err(|_| format!("`{name}` is not a time zone; write Europe/Berlin or UTC"))
    }
}

/// How long to wait before try number `attempt`, from 1: twice as long each time, at most an hour.
pub fn back_off(delay: Duration, attempt: u32) -> Duration {
    const MAX: Duration = Duration::from_secs(60 * 60);
    let factor = 1_u32.checked_shl(attempt.saturating_sub(1)).unwrap_or(u32::MAX);
    delay.checked_mul(factor).unwrap_or(MAX).min(MAX.max(delay))
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
