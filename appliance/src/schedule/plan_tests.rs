use super::*;

fn at(text: &str) -> DateTime<Utc> {
    DateTime::parse_from_rfc3339(text).unwrap().to_utc()
}

fn plan(pattern: &str, zone: &str) -> Plan {
    Plan { zone: Zone::parse(zone).unwrap(), ..Plan::new(pattern).unwrap() }
}

/// A simulated service: looks as often as it is told to, and notes when it runs and what it skips. Each run takes `takes`.
struct Simulation {
    plan: Plan,
    past: Past,
    running_until: Option<DateTime<Utc>>,
    runs: Vec<DateTime<Utc>>,
    skipped: Vec<(DateTime<Utc>, &'static str)>,
}

impl Simulation {
    fn new(plan: Plan, begin: DateTime<Utc>) -> Simulation {
        let past = Past { handled: begin, ended: None };
        Simulation { plan, past, running_until: None, runs: Vec::new(), skipped: Vec::new() }
    }

    /// Runs from `from` to `to` under a fake clock, as the runner does: it sleeps for as long as it is told, 30 s at most.
    fn go(&mut self, from: DateTime<Utc>, to: DateTime<Utc>, takes: TimeDelta) {
        let mut now = from;
        while now < to {
            if self.running_until.is_some_and(|until| until <= now) {
                self.past.ended = self.running_until.take();
            }
            let step = match self.plan.decide("daily", self.past, self.running_until.is_some(), now) {
                Verdict::Wait(until) => (until - now).min(TimeDelta::seconds(30)).max(TimeDelta::milliseconds(1)),
                Verdict::Run(due) => {
                    self.past.handled = due;
                    self.running_until = Some(now + takes);
                    self.runs.push(now);
                    TimeDelta::zero()
                }
                Verdict::Skip(due, why) => {
                    self.past.handled = due;
                    self.skipped.push((due, why));
                    TimeDelta::zero()
                }
                Verdict::Never => TimeDelta::seconds(30),
            };
            now += step;
        }
    }
}

/// Local wall clock times of the runs, without seconds.
fn local(runs: &[DateTime<Utc>], zone: &str) -> Vec<String> {
    let zone: Tz = zone.parse().unwrap();
    runs.iter().map(|run| run.with_timezone(&zone).format("%m-%d %H:%M").to_string()).collect()
}

#[test]
fn twenty_four_days_across_a_change_of_the_clock_have_one_run_each() {
    // Forward, backward, by half an hour, at midnight, and a zone that never changes.
    for (zone, begin, changed) in [
        ("Europe/Berlin", "2026-03-17T00:00:00Z", "03-29 03:00"),
        ("Europe/Berlin", "2026-10-13T00:00:00Z", "10-25 02:30"),
        ("America/New_York", "2026-02-25T12:00:00Z", "03-08 03:00"),
        ("Australia/Lord_Howe", "2026-09-22T00:00:00Z", "10-04 02:30"),
        ("Africa/Cairo", "2026-04-12T03:00:00Z", "04-24 02:30"),
        ("Asia/Tokyo", "2026-03-17T00:00:00Z", "03-29 02:30"),
    ] {
        let begin = at(begin);
        let end = begin + TimeDelta::days(24);
        let mut simulation = Simulation::new(plan("30 2 * * *", zone), begin);
        simulation.go(begin, end, TimeDelta::minutes(20));
        let runs = local(&simulation.runs, zone);
        assert_eq!(runs.len(), 24, "{zone}: {runs:?}");
        assert_eq!(simulation.skipped, [], "{zone}");
        let days: std::collections::BTreeSet<&str> = runs.iter().map(|run| &run[..5]).collect();
        assert_eq!(days.len(), 24, "{zone}: a day has two runs: {runs:?}");
        assert!(runs.iter().any(|run| run == changed), "{zone}: {runs:?}");
        let usual = runs.iter().filter(|run| run.ends_with("02:30")).count();
        assert!(usual >= 23, "{zone}: {runs:?}");
    }
}

#[test]
fn every_quarter_of_an_hour_goes_by_real_time_on_a_day_of_25_hours() {
    let (begin, end) = (at("2026-10-24T22:00:00Z"), at("2026-10-25T23:00:00Z"));
    let mut simulation = Simulation::new(plan("*/15 * * * *", "Europe/Berlin"), begin);
    simulation.go(begin, end, TimeDelta::minutes(1));
    assert_eq!(simulation.runs.len(), 25 * 4 - 1, "the first one is due a quarter after the beginning");
    let mut gaps = simulation.runs.windows(2).map(|pair| pair[1] - pair[0]);
    assert!(gaps.all(|gap| gap == TimeDelta::minutes(15)));
}

#[test]
fn what_was_missed_is_made_up_for_once_or_skipped() {
    let begin = at("2026-06-01T00:00:00Z");
    for (missed, expected) in [
        (Missed::Run, vec!["06-01 03:00", "06-04 12:00", "06-05 03:00"]),
        (Missed::Skip, vec!["06-01 03:00", "06-05 03:00"]),
    ] {
        let plan = Plan { missed, ..plan("0 3 * * *", "UTC") };
        let mut simulation = Simulation::new(plan, begin);
        simulation.go(begin, at("2026-06-01T12:00:00Z"), TimeDelta::minutes(5));
        // Three days without a service.
        simulation.go(at("2026-06-04T12:00:00Z"), at("2026-06-05T12:00:00Z"), TimeDelta::minutes(5));
        assert_eq!(local(&simulation.runs, "UTC"), expected, "{missed:?}");
        let skipped = simulation.skipped.len();
        // The two older ones at once.
        assert_eq!(skipped, if missed == Missed::Run { 1 } else { 2 }, "{:?}", simulation.skipped);
    }
}

#[test]
fn a_run_that_is_too_long_makes_the_next_one_be_skipped_or_wait() {
    let (begin, end) = (at("2026-06-01T00:00:00Z"), at("2026-06-01T06:30:00Z"));
    for (overlap, expected) in [
        (Overlap::Skip, vec!["06-01 01:00", "06-01 03:00", "06-01 05:00"]),
        (Overlap::Wait, vec!["06-01 01:00", "06-01 02:30", "06-01 04:00", "06-01 05:30"]),
    ] {
        for missed in [Missed::Run, Missed::Skip] {
            let plan = Plan { overlap, missed, ..plan("0 * * * *", "UTC") };
            let mut simulation = Simulation::new(plan, begin);
            simulation.go(begin, end, TimeDelta::minutes(90));
            assert_eq!(local(&simulation.runs, "UTC"), expected, "{overlap:?} {missed:?}");
        }
    }
}

#[test]
fn runs_begin_within_their_window() {
    let begin = at("2026-06-01T00:00:00Z");
    let window = Some(Window::parse("22:00-06:00").unwrap());
    let plan = Plan { window, ..plan("0 */4 * * *", "UTC") };
    let mut simulation = Simulation::new(plan, begin);
    simulation.go(begin, begin + TimeDelta::days(2), TimeDelta::minutes(5));
    // 08:00, 12:00, 16:00 and 20:00 all wait for 22:00, where the newest of them runs for all.
    assert_eq!(
        local(&simulation.runs, "UTC"),
        ["06-01 04:00", "06-01 22:00", "06-02 00:00", "06-02 04:00", "06-02 22:00"]
    );
    for bad in ["22:00", "22-06", "25:00-06:00", "06:00-06:00", ""] {
        assert!(Window::parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn jitter_is_bounded_differs_and_is_the_same_again() {
    let plan = Plan { jitter: Duration::from_secs(600), ..plan("0 3 * * *", "UTC") };
    let due = at("2026-06-01T03:00:00Z");
    let late = |policy: &str, due| plan.start(policy, due) - due;
    for policy in ["a", "b", "c", "d"] {
        for day in 0..100 {
            let due = due + TimeDelta::days(day);
            let late = late(policy, due);
            assert!(late >= TimeDelta::zero() && late <= TimeDelta::seconds(600), "{late}");
            assert_eq!(plan.start(policy, due), plan.clone().start(policy, due));
        }
    }
    assert_ne!(late("a", due), late("b", due));
    assert_ne!(late("a", due), late("a", due + TimeDelta::days(1)));
    let mut simulation = Simulation::new(plan, at("2026-06-01T00:00:00Z"));
    simulation.go(at("2026-06-01T00:00:00Z"), at("2026-06-08T00:00:00Z"), TimeDelta::minutes(5));
    assert_eq!(simulation.runs.len(), 7);
}

#[test]
fn a_year_of_missed_minutes_is_one_step() {
    let plan = plan("* * * * *", "Europe/Berlin");
    let (handled, now) = (at("2025-06-01T00:00:00Z"), at("2026-06-01T12:00:30Z"));
    let past = Past { handled, ended: None };
    assert_eq!(
        plan.decide("p", past, false, now),
        Verdict::Skip(at("2026-06-01T11:59:00Z"), "it was missed, and a later one is due")
    );
    let past = Past { handled: at("2026-06-01T11:59:00Z"), ended: None };
    assert_eq!(plan.decide("p", past, false, now), Verdict::Run(at("2026-06-01T12:00:00Z")));
}

#[test]
fn patterns_and_zones_are_checked() {
    for bad in ["", "* * * *", "61 * * * *", "* * * * * *", "daily", "0 3 * * MOO"] {
        assert!(Plan::new(bad).is_err(), "{bad}");
    }
    for good in ["0 3 * * *", "*/5 * * * *", "0 3 * * MON-FRI", "0 3 L * *", "@daily"] {
        assert!(Plan::new(good).is_ok(), "{good}");
    }
    assert!(Zone::parse("Europe/Bern").is_err());
    let never = plan("0 3 31 2 *", "UTC");
    assert_eq!(never.next(at("2026-06-01T00:00:00Z")), None);
}

#[test]
fn tries_wait_twice_as_long_each_time_up_to_an_hour() {
    let waits = [1, 2, 3, 20, 64].map(|attempt| back_off(Duration::from_secs(60), attempt).as_secs());
    assert_eq!(waits, [60, 120, 240, 3600, 3600]);
}
