//! What is to be kept: rules as they are given.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problem::Problem;

/// More than any history holds.
const COUNT_MAX: u64 = 1_000_000;

/// How many points are kept, and of which kinds. A point that any rule keeps stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Rules {
    /// The newest points.
    pub last: u64,
    /// The newest point of each of the newest hours that have one.
    pub hourly: u64,
    /// The same of days.
    pub daily: u64,
    /// The same of weeks, which begin on Monday (ISO 8601).
    pub weekly: u64,
    /// The same of months.
    pub monthly: u64,
    /// The same of years.
    pub yearly: u64,
    /// All points that are not older than this, from the machine's newest point.
    pub within: Option<Span>,
    /// Points that have one of these labels.
    pub labels: Vec<(String, String)>,
}

impl Rules {
    /// Whether no rule keeps anything.
    pub fn is_empty(&self) -> bool {
        let counts = [self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly];
        counts.iter().all(|count| *count == 0) && self.within.is_none() && self.labels.is_empty()
    }

    /// Refuses what can only be a mistake.
    pub fn check(&self) -> Result<(), Problem> {
        if self.within == Some(Span::default()) {
            return Err(Problem::usage("--keep-within a length of no time keeps nothing")
                .hint("write 14d, 6h, 2w, 3m (months), 1y or 1y6m, or leave it out"));
        }
        let counts = [self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly];
        match counts.iter().find(|count| **count > COUNT_MAX) {
            Some(count) => Err(Problem::usage(format!("{count} points are more than can be counted"))
                .hint("to keep all points, do not prune")),
            None => Ok(()),
        }
    }
}

/// A length of time by the calendar, in the units it was given in: `1y6m`, `2w`, `14d`, `36h`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Span {
    /// Years.
    pub years: u32,
    /// Months.
    pub months: u32,
    /// Weeks.
    pub weeks: u32,
    /// Days, which may have 23 or 25 hours.
    pub days: u32,
    /// Hours.
    pub hours: u32,
}

impl Span {
    /// From what a person writes: numbers with `y`, `m` (months), `w`, `d` or `h`, largest first.
    pub fn parse(text: &str) -> Result<Span, String> {
        let bad = || format!("`{text}` is not a length of time; write 14d, 6h, 2w, 3m (months), 1y or 1y6m");
        let mut span = Span::default();
        let (mut rest, mut least) = (text.trim(), 0);
        if rest.is_empty() {
            return Err(bad());
        }
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
            let (number, tail) = rest.split_at(digits);
            let number: u32 = number.parse().ok().filter(|number| *number <= 100_000).ok_or_else(bad)?;
            let mut tail = tail.chars();
            let (place, of) = match tail.next() {
                Some('y') => (1, &mut span.years),
                Some('m') => (2, &mut span.months),
                Some('w') => (3, &mut span.weeks),
                Some('d') => (4, &mut span.days),
                Some('h') => (5, &mut span.hours),
                _ => return Err(bad()),
            };
            if place <= least {
                return Err(bad());
            }
            *of = number;
            (least, rest) = (place, tail.as_str());
        }
        Ok(span)
    }
}

impl std::fmt::Display for Span {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = [(self.years, "y"), (self.months, "m"), (self.weeks, "w"), (self.days, "d"), (self.hours, "h")];
        let mut written = false;
        for (number, unit) in parts.into_iter().filter(|(number, _)| *number > 0) {
            write!(out, "{number}{unit}")?;
            written = true;
        }
        if written { Ok(()) } else { out.write_str("0h") }
    }
}

/// Labels from `KEY=VALUE`, no key twice.
pub fn parse_labels(texts: &[String]) -> Result<BTreeMap<String, String>, Problem> {
    let mut labels = BTreeMap::new();
    for text in texts {
        let (key, value) = parse_label(text)?;
        if labels.insert(key.clone(), value).is_some() {
            return Err(Problem::usage(format!("label `{key}` is given twice")).hint("a label has one value"));
        }
    }
    Ok(labels)
}

/// One `KEY=VALUE`.
pub fn parse_label(text: &str) -> Result<(String, String), Problem> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(Problem::usage(format!("label `{text}` has no value")).hint("write --label KEY=VALUE")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_are_read_as_people_write_them() {
        let span = |years, months, weeks, days, hours| Ok(Span { years, months, weeks, days, hours });
        for (text, expected) in [
            ("14d", span(0, 0, 0, 14, 0)),
            ("36h", span(0, 0, 0, 0, 36)),
            ("18m", span(0, 18, 0, 0, 0)),
            ("1y", span(1, 0, 0, 0, 0)),
            ("1y6m2w3d4h", span(1, 6, 2, 3, 4)),
            (" 2w ", span(0, 0, 2, 0, 0)),
        ] {
            assert_eq!(Span::parse(text), expected, "{text}");
            assert_eq!(expected.map(|span| span.to_string()).as_deref(), Ok(text.trim()));
        }
        for text in ["", "14", "d", "-1d", "1d2d", "1d1y", "1.5d", "1s", "999999d", "1 d", "١d"] {
            assert!(Span::parse(text).is_err(), "{text}");
        }
        assert_eq!(Span::default().to_string(), "0h");
    }

    #[test]
    fn a_label_is_given_once() {
        let parse = |texts: &[&str]| parse_labels(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        assert_eq!(parse(&["a=1", "b=x=y", "c="]).expect("valid").len(), 3);
        for bad in [&["a=1", "a=2"][..], &["a=1", "a=1"], &["a"], &["=1"]] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
