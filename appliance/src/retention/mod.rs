//! Retention: which recovery points of a machine stay. [`decide`] is a pure function of points, rules, time and zone;
//! what protects a point is passed in, and checked once more by the store when a point is forgotten.
//!
//! A calendar rule (`daily 7`) looks at a machine's points from the newest to the oldest and keeps the newest point of
//! each of the first seven days that have one, by the local calendar. Days without a point do not count. Two hours of
//! the same name, when clocks are set back, are two hours.

mod calendar;
pub mod prune;
pub mod rules;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeZone, Utc};

pub use calendar::Period;
pub use rules::{Rules, Span};

/// What retention knows of a point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub machine: String,
    /// When it was made.
    pub time: DateTime<Utc>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// What keeps it whatever the rules say.
    pub holds: Vec<Reason>,
}

/// Which points the rules look at. The others stay.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Only these machines; all if empty.
    pub machines: BTreeSet<String>,
    /// Only points that have all of these labels.
    pub labels: BTreeMap<String, String>,
    /// Points of a machine that differ in this label's value are looked at by themselves.
    pub group_by: Option<String>,
}

/// Why a point stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// It is of another machine than those asked for, or lacks a label.
    NotAsked,
    /// It is its machine's newest.
    Newest,
    /// One of the newest.
    Last {
        /// Which one, from 1.
        number: u64,
        /// Of how many.
        of: u64,
    },
    /// The newest of a period.
    Period {
        /// The rule.
        period: Period,
        /// Which one, from 1.
        number: u64,
        /// Of how many.
        of: u64,
        /// The period's name.
        name: String,
    },
    /// Not older than this.
    Within(Span),
    /// It has a label that keeps.
    Label(String, String),
    /// Somebody protects it; until when, if that ends.
    Protected(Option<DateTime<Utc>>),
    /// What protects it is damaged.
    ProtectionDamaged,
    /// Somebody uses it.
    Held(String),
}

/// What becomes of a point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Which candidate, by its place.
    pub at: usize,
    /// All that keeps it; empty if it goes.
    pub keep: Vec<Reason>,
    /// For one that goes: by rule, why it does not stay.
    pub passed_over: Vec<String>,
    /// Its machine's newest point, by its place.
    pub newest: usize,
}

/// Decides about every candidate, in their order.
pub fn decide<Z: TimeZone>(
    points: &[Candidate],
    rules: &Rules,
    filter: &Filter,
    now: DateTime<Utc>,
    zone: &Z,
) -> Vec<Decision> {
    let order = newest_first(points);
    let mut newest: BTreeMap<&str, usize> = BTreeMap::new();
    for at in &order {
        newest.entry(&points[*at].machine).or_insert(*at);
    }
    let mut decisions: Vec<Decision> = (0..points.len())
        .map(|at| Decision {
            at,
            keep: Vec::new(),
            passed_over: Vec::new(),
            newest: newest[points[at].machine.as_str()],
        })
        .collect();
    let mut groups: BTreeMap<(&str, Option<&String>), Vec<usize>> = BTreeMap::new();
    for at in order {
        let point = &points[at];
        if filter.asks_for(point) {
            let value = filter.group_by.as_ref().and_then(|key| point.labels.get(key));
            groups.entry((&point.machine, value)).or_default().push(at);
        } else {
            decisions[at].keep.push(Reason::NotAsked);
        }
    }
    for group in groups.values() {
        apply(points, group, rules, now, zone, &mut decisions);
    }
    for (decision, point) in decisions.iter_mut().zip(points) {
        if decision.newest == decision.at {
            decision.keep.push(Reason::Newest);
        }
        decision.keep.extend(point.holds.iter().cloned());
        if !decision.keep.is_empty() {
            decision.passed_over.clear();
        }
    }
    decisions
}

impl Filter {
    fn asks_for(&self, point: &Candidate) -> bool {
        let machine = self.machines.is_empty() || self.machines.contains(&point.machine);
        machine && self.labels.iter().all(|(key, value)| point.labels.get(key) == Some(value))
    }
}

/// Of two points of the same time, the one with the lesser id is taken for the newer, as in the list of points.
fn newest_first(points: &[Candidate]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_by(|a, b| (points[*b].time, &points[*b].id).cmp(&(points[*a].time, &points[*a].id)));
    order
}

/// Applies the rules to the points of a group, newest first.
fn apply<Z: TimeZone>(
    points: &[Candidate],
    group: &[usize],
    rules: &Rules,
    now: DateTime<Utc>,
    zone: &Z,
    decisions: &mut [Decision],
) {
    for (number, at) in (1..).zip(group) {
        if number <= rules.last {
            decisions[*at].keep.push(Reason::Last { number, of: rules.last });
        } else if rules.last > 0 {
            decisions[*at].passed_over.push(format!("not among the last {}", rules.last));
        }
    }
    for (period, of) in Period::ALL.into_iter().zip(rules.of_periods()) {
        if of > 0 {
            apply_period(points, group, period, of, zone, decisions);
        }
    }
    if let (Some(span), Some(first)) = (rules.within, group.first()) {
        let since = calendar::before(points[*first].time.min(now), span, zone);
        for at in group {
            if points[*at].time >= since {
                decisions[*at].keep.push(Reason::Within(span));
            } else {
                decisions[*at].passed_over.push(format!("older than {span}"));
            }
        }
    }
    for at in group {
        let has = |(key, value): &&(String, String)| points[*at].labels.get(key) == Some(value);
        match rules.labels.iter().find(has) {
            Some((key, value)) => decisions[*at].keep.push(Reason::Label(key.clone(), value.clone())),
            None if !rules.labels.is_empty() => decisions[*at].passed_over.push("has no label that keeps".to_owned()),
            None => {}
        }
    }
}

fn apply_period<Z: TimeZone>(
    points: &[Candidate],
    group: &[usize],
    period: Period,
    of: u64,
    zone: &Z,
    decisions: &mut [Decision],
) {
    // By name: where clocks are set back over midnight, a day's times do not follow each other.
    let mut met: BTreeMap<String, usize> = BTreeMap::new();
    for at in group {
        let name = period.name(points[*at].time, zone);
        let next = met.len() as u64 + 1;
        match met.get(&name) {
            None if next <= of => {
                met.insert(name.clone(), *at);
                decisions[*at].keep.push(Reason::Period { period, number: next, of, name });
            }
            Some(newest) => {
                let newer = crate::catalog::spec::short_id(&points[*newest].id);
                decisions[*at].passed_over.push(format!("{period}: {newer} is newer in {name}"));
            }
            None => decisions[*at].passed_over.push(format!("{period}: {of} newer ones are kept")),
        }
    }
}

impl Rules {
    /// In the order of [`Period::ALL`].
    fn of_periods(&self) -> [u64; 5] {
        [self.hourly, self.daily, self.weekly, self.monthly, self.yearly]
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reason::NotAsked => out.write_str("not asked for"),
            Reason::Newest => out.write_str("the machine's newest"),
            Reason::Last { number, of } => write!(out, "last {number} of {of}"),
            Reason::Period { period, number, of, name } => write!(out, "{period} {number} of {of}: newest of {name}"),
            Reason::Within(span) => write!(out, "within {span}"),
            Reason::Label(key, value) => write!(out, "label {key}={value}"),
            Reason::Protected(None) => out.write_str("protected"),
            Reason::Protected(Some(until)) => {
                write!(out, "protected until {}", until.with_timezone(&chrono::Local).format("%Y-%m-%d %H:%M:%S"))
            }
            Reason::ProtectionDamaged => out.write_str("protected (the protection is damaged)"),
            Reason::Held(who) => write!(out, "held by {who}"),
        }
    }
}
