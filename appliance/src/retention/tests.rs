//! Retention against a naive model, in zones whose clocks and calendars jump.

use chrono::{Datelike, NaiveDate, Offset, TimeDelta};
use chrono_tz::Tz;
use proptest::prelude::*;

use super::*;

/// Summer time by an hour and by half an hour, at midnight, a skipped day, odd distances from UTC, none.
const ZONES: [Tz; 9] = [
    Tz::Europe__Berlin,
    Tz::America__New_York,
    Tz::Australia__Lord_Howe,
    Tz::America__Sao_Paulo,
    Tz::America__St_Johns,
    Tz::Pacific__Apia,
    Tz::Africa__Casablanca,
    Tz::Asia__Kathmandu,
    Tz::UTC,
];

fn at(text: &str) -> DateTime<Utc> {
    DateTime::parse_from_rfc3339(text).expect("a time").to_utc()
}

fn point(id: usize, machine: &str, time: DateTime<Utc>) -> Candidate {
    Candidate { id: format!("{id:064}"), machine: machine.into(), time, labels: BTreeMap::new(), holds: Vec::new() }
}

/// Points of one machine at these times.
fn points(times: &[&str]) -> Vec<Candidate> {
    times.iter().enumerate().map(|(id, time)| point(id, "web01", at(time))).collect()
}

fn kept(points: &[Candidate], rules: &Rules, zone: Tz) -> Vec<usize> {
    let now = at("2030-01-01T00:00:00Z");
    let decisions = decide(points, rules, &Filter::default(), now, &zone);
    decisions.iter().filter(|decision| !decision.keep.is_empty()).map(|decision| decision.at).collect()
}

#[test]
fn a_day_is_a_day_of_the_local_calendar() {
    // 2026-03-29 has 23 hours in Berlin, 2026-10-25 has 25.
    let rules = Rules { daily: 10, ..Rules::default() };
    let spring =
        points(&["2026-03-28T22:59:59Z", "2026-03-28T23:00:00Z", "2026-03-29T21:59:59Z", "2026-03-29T22:00:00Z"]);
    assert_eq!(kept(&spring, &rules, Tz::Europe__Berlin), [0, 2, 3]);
    let autumn =
        points(&["2026-10-24T21:59:59Z", "2026-10-24T22:00:00Z", "2026-10-25T22:59:59Z", "2026-10-25T23:00:00Z"]);
    assert_eq!(kept(&autumn, &rules, Tz::Europe__Berlin), [0, 2, 3]);
    assert_eq!(kept(&autumn, &rules, Tz::UTC), [1, 3]);
}

#[test]
fn the_hour_that_comes_twice_is_two_hours() {
    let rules = Rules { hourly: 10, ..Rules::default() };
    let autumn =
        points(&["2026-10-25T00:10:00Z", "2026-10-25T00:50:00Z", "2026-10-25T01:10:00Z", "2026-10-25T02:10:00Z"]);
    assert_eq!(kept(&autumn, &rules, Tz::Europe__Berlin), [1, 2, 3]);
}

#[test]
fn weeks_begin_on_monday_and_belong_to_the_year_of_their_thursday() {
    let rules = Rules { weekly: 10, ..Rules::default() };
    // Sunday and Monday, then the last days of 2026 and the first of 2027, which are one week: 2026-W53.
    let times = [
        "2026-11-15T12:00:00Z",
        "2026-11-16T12:00:00Z",
        "2026-12-28T12:00:00Z",
        "2027-01-03T12:00:00Z",
        "2027-01-04T12:00:00Z",
    ];
    assert_eq!(kept(&points(&times), &rules, Tz::UTC), [0, 1, 3, 4]);
    assert_eq!(Period::Weekly.name(at("2027-01-03T12:00:00Z"), &Tz::UTC), "2026-W53");
}

#[test]
fn days_without_a_point_do_not_count() {
    let rules = Rules { daily: 3, ..Rules::default() };
    let times = [
        "2026-01-01T12:00:00Z",
        "2026-02-01T12:00:00Z",
        "2026-06-01T12:00:00Z",
        "2026-11-01T10:00:00Z",
        "2026-11-01T12:00:00Z",
    ];
    assert_eq!(kept(&points(&times), &rules, Tz::UTC), [1, 2, 4]);
}

#[test]
fn spans_are_counted_on_the_calendar() {
    let span = |text: &str| Span::parse(text).expect("a span");
    let before = |time, text, zone: Tz| calendar::before(at(time), span(text), &zone);
    // Noon to noon, over the night with 23 hours and the one with 25.
    assert_eq!(before("2026-03-29T10:00:00Z", "1d", Tz::Europe__Berlin), at("2026-03-28T11:00:00Z"));
    assert_eq!(before("2026-10-25T11:00:00Z", "1d", Tz::Europe__Berlin), at("2026-10-24T10:00:00Z"));
    assert_eq!(before("2026-03-29T10:00:00Z", "24h", Tz::Europe__Berlin), at("2026-03-28T10:00:00Z"));
    // A month that is too short, a leap day.
    assert_eq!(before("2026-03-31T12:00:00Z", "1m", Tz::UTC), at("2026-02-28T12:00:00Z"));
    assert_eq!(before("2028-02-29T12:00:00Z", "1y", Tz::UTC), at("2027-02-28T12:00:00Z"));
    // 02:30 was skipped that night: the last moment before. 02:30 comes twice: the first.
    assert_eq!(before("2026-03-30T00:30:00Z", "1d", Tz::Europe__Berlin), at("2026-03-29T00:45:00Z"));
    assert_eq!(before("2026-10-26T01:30:00Z", "1d", Tz::Europe__Berlin), at("2026-10-25T00:30:00Z"));
    // Apia had no 30 December 2011.
    assert_eq!(before("2011-12-30T22:00:00Z", "1d", Tz::Pacific__Apia), at("2011-12-30T09:45:00Z"));
    assert!(before("2026-01-01T00:00:00Z", "100000y100000m100000w", Tz::UTC) < at("0001-01-01T00:00:00Z"));
    assert_eq!(before("2026-10-25T01:30:00Z", "0d", Tz::Europe__Berlin), at("2026-10-25T01:30:00Z"));
}

#[test]
fn a_span_is_counted_from_the_newest_point_but_not_from_the_future() {
    let rules = Rules { within: Some(Span { days: 2, ..Span::default() }), ..Rules::default() };
    let old = ["2026-01-01T12:00:00Z", "2026-01-09T12:00:00Z", "2026-01-10T12:00:00Z"];
    assert_eq!(
        kept(&points(&old), &rules, Tz::UTC),
        [1, 2],
        "a machine that is not backed up any more keeps its points"
    );
    let clock = ["2029-12-31T12:00:00Z", "2040-01-01T00:00:00Z"];
    assert_eq!(kept(&points(&clock), &rules, Tz::UTC), [0, 1], "a wrong clock does not drop the others");
}

#[test]
fn the_newest_the_held_and_what_was_not_asked_for_stay() {
    let mut all =
        points(&["2026-01-01T12:00:00Z", "2026-01-02T12:00:00Z", "2026-01-03T12:00:00Z", "2026-01-04T12:00:00Z"]);
    all.push(point(4, "db", at("2026-01-01T12:00:00Z")));
    all[0].holds = vec![Reason::Held("recovery web01".into())];
    all[1].labels = BTreeMap::from([("kind".into(), "nightly".into())]);
    let rules = Rules { labels: vec![("nobody".into(), "has".into())], ..Rules::default() };
    let decide = |filter: &Filter| decide(&all, &rules, filter, at("2030-01-01T00:00:00Z"), &Tz::UTC);
    let gone = |decisions: Vec<Decision>| -> Vec<usize> {
        decisions.iter().filter(|decision| decision.keep.is_empty()).map(|decision| decision.at).collect()
    };
    assert_eq!(gone(decide(&Filter::default())), [1, 2]);
    let labelled = Filter { labels: BTreeMap::from([("kind".into(), "nightly".into())]), ..Filter::default() };
    assert_eq!(gone(decide(&labelled)), [1]);
    let other = Filter { machines: BTreeSet::from(["db".into()]), ..Filter::default() };
    assert!(gone(decide(&other)).is_empty());
    let kept = &decide(&Filter::default())[0].keep;
    assert_eq!(kept.iter().map(ToString::to_string).collect::<Vec<_>>(), ["held by recovery web01"]);
}

#[test]
fn every_decision_says_why() {
    let times = ["2026-11-18T03:00:00Z", "2026-11-19T03:00:00Z", "2026-11-19T15:00:00Z", "2026-11-20T03:00:00Z"];
    let rules = Rules { daily: 2, within: Some(Span { hours: 6, ..Span::default() }), ..Rules::default() };
    let all = points(&times);
    let decisions = decide(&all, &rules, &Filter::default(), at("2026-11-20T12:00:00Z"), &Tz::UTC);
    let told: Vec<Vec<String>> = decisions
        .iter()
        .map(|decision| {
            [decision.keep.iter().map(ToString::to_string).collect(), decision.passed_over.clone()].concat()
        })
        .collect();
    assert_eq!(told[3], ["daily 1 of 2: newest of 2026-11-20", "within 6h", "the machine's newest"]);
    assert_eq!(told[2], ["daily 2 of 2: newest of 2026-11-19"]);
    assert_eq!(told[1], ["daily: 000000000000 is newer in 2026-11-19", "older than 6h"]);
    assert_eq!(told[0], ["daily: 2 newer ones are kept", "older than 6h"]);
}

/// When in the local calendar a time lies, computed without the code under test.
fn period_key(period: Period, time: DateTime<Utc>, zone: Tz) -> (i64, i64) {
    let offset = i64::from(zone.offset_from_utc_datetime(&time.naive_utc()).fix().local_minus_utc());
    let seconds = time.timestamp() + offset;
    let day = seconds.div_euclid(86_400);
    let date = NaiveDate::from_ymd_opt(1970, 1, 1).expect("a date") + TimeDelta::days(day);
    match period {
        Period::Hourly => (seconds.div_euclid(3600), offset),
        Period::Daily => (day, 0),
        Period::Weekly => ((day + 3).div_euclid(7), 0), // 1970-01-01 was a Thursday
        Period::Monthly => (i64::from(date.year()), i64::from(date.month())),
        Period::Yearly => (i64::from(date.year()), 0),
    }
}

/// Whether the rules keep a point, straight from their definition.
fn model_keeps(points: &[Candidate], this: &Candidate, rules: &Rules, zone: Tz) -> bool {
    let newer = |a: &Candidate, b: &Candidate| (a.time, &a.id) > (b.time, &b.id);
    let same: Vec<&Candidate> = points.iter().filter(|other| other.machine == this.machine).collect();
    let before_it: Vec<&&Candidate> = same.iter().filter(|other| newer(other, this)).collect();
    let is_newest = before_it.is_empty();
    let last = (before_it.len() as u64) < rules.last;
    let by_period = |period: Period, of: u64| {
        let key = period_key(period, this.time, zone);
        let keys: BTreeSet<_> = before_it.iter().map(|other| period_key(period, other.time, zone)).collect();
        !keys.contains(&key) && (keys.len() as u64) < of
    };
    let label = rules.labels.iter().any(|(key, value)| this.labels.get(key) == Some(value));
    is_newest
        || last
        || label
        || !this.holds.is_empty()
        || by_period(Period::Hourly, rules.hourly)
        || by_period(Period::Daily, rules.daily)
        || by_period(Period::Weekly, rules.weekly)
        || by_period(Period::Monthly, rules.monthly)
        || by_period(Period::Yearly, rules.yearly)
}

/// Around the days on which clocks are changed, and anywhere else.
fn any_time() -> impl Strategy<Value = i64> {
    let near = |text: &str| {
        let around = at(text).timestamp();
        (around - 200_000..around + 200_000).boxed()
    };
    prop_oneof![
        near("2026-03-29T01:00:00Z"),
        near("2026-10-25T01:00:00Z"),
        near("2011-12-30T10:00:00Z"),
        near("2010-11-07T02:31:00Z"),
        near("2017-10-15T03:00:00Z"),
        near("2026-12-31T12:00:00Z"),
        1_200_000_000i64..1_900_000_000,
    ]
}

fn any_point() -> impl Strategy<Value = (i64, bool, u8, u8)> {
    (any_time(), any::<bool>(), 0u8..12, 0u8..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn decisions_are_those_of_the_model(
        times in proptest::collection::vec(any_point(), 1..60),
        zone in 0usize..ZONES.len(),
        counts in proptest::collection::vec(0u64..6, 6),
        label in any::<bool>(),
    ) {
        let zone = ZONES[zone];
        let all: Vec<Candidate> = times.iter().enumerate().map(|(id, (seconds, other, held, labelled))| {
            let machine = if *other { "db" } else { "web01" };
            let mut point = point(id, machine, DateTime::from_timestamp(*seconds, 0).expect("in range"));
            if *held == 0 {
                point.holds.push(Reason::Protected(None));
            }
            if *labelled == 0 {
                point.labels.insert("keep".into(), "yes".into());
            }
            point
        }).collect();
        let labels = if label { vec![("keep".to_owned(), "yes".to_owned())] } else { Vec::new() };
        let rules = Rules {
            last: counts[0], hourly: counts[1], daily: counts[2], weekly: counts[3], monthly: counts[4],
            yearly: counts[5], within: None, labels,
        };
        let decisions = decide(&all, &rules, &Filter::default(), at("2030-01-01T00:00:00Z"), &zone);
        for (decision, point) in decisions.iter().zip(&all) {
            let expected = model_keeps(&all, point, &rules, zone);
            prop_assert_eq!(!decision.keep.is_empty(), expected, "{} in {}: {:?}", point.time, zone, decision);
            prop_assert!(!decision.keep.is_empty() || !decision.passed_over.is_empty() || rules.is_empty());
            prop_assert_eq!(&all[decision.newest].machine, &point.machine);
        }
        // Pruned once, nothing more goes: what is kept is kept for the same reasons.
        let left: Vec<Candidate> =
            decisions.iter().filter(|decision| !decision.keep.is_empty()).map(|decision| all[decision.at].clone()).collect();
        let again = decide(&left, &rules, &Filter::default(), at("2030-01-01T00:00:00Z"), &zone);
        prop_assert!(again.iter().all(|decision| !decision.keep.is_empty()));
    }

    #[test]
    fn spans_of_days_are_as_many_midnights(seconds in any_time(), days in 0u32..800, zone in 0usize..ZONES.len()) {
        let zone = ZONES[zone];
        let time = DateTime::from_timestamp(seconds, 0).expect("in range");
        let before = calendar::before(time, Span { days, ..Span::default() }, &zone);
        prop_assert!(before <= time);
        let date = |time: DateTime<Utc>| time.with_timezone(&zone).date_naive();
        let passed = (date(time) - date(before)).num_days();
        // A time that was skipped at midnight lies on the day before; Apia skipped a day.
        prop_assert!((i64::from(days)..=i64::from(days) + 1).contains(&passed), "{passed} days");
    }
}
