//! How a person names a recovery point: an id prefix, `MACHINE`, `MACHINE~1` or `MACHINE@TIME`.

use std::sync::Arc;

use chrono::{DateTime, Local, NaiveDate, NaiveDateTime, TimeZone, Utc};

use super::PointSummary;
use crate::problem::Problem;

/// Shortest id prefix that is taken for one.
pub const PREFIX_MIN: usize = 4;
/// So many of the points that an ambiguous name may mean are named.
const NAMED_MAX: usize = 5;

/// Finds the point that `spec` names among `points`, which are sorted oldest first.
pub fn resolve<'a>(points: &'a [Arc<PointSummary>], spec: &str) -> Result<&'a PointSummary, Problem> {
    if spec.is_empty() {
        return Err(Problem::usage("a recovery point needs a name")
            .hint("use an id prefix, MACHINE, MACHINE~1 or MACHINE@TIME; `lifeboat points` lists them"));
    }
    let of =
        |machine: &str| points.iter().map(Arc::as_ref).filter(|point| point.machine == machine).collect::<Vec<_>>();
    let newest = of(spec);
    if let Some(point) = newest.last() {
        return Ok(point);
    }
    if let Some((machine, back)) = spec.rsplit_once('~')
        && !of(machine).is_empty()
    {
        return nth_newest(&of(machine), machine, back);
    }
    if let Some((machine, time)) = spec.rsplit_once('@')
        && !of(machine).is_empty()
    {
        return at_time(&of(machine), machine, time);
    }
    by_prefix(points, spec)
}

fn nth_newest<'a>(points: &[&'a PointSummary], machine: &str, back: &str) -> Result<&'a PointSummary, Problem> {
    let back: usize = back.parse().map_err(|_| {
        let wrong = match back {
            "" => format!("`{machine}~` lacks a number"),
            _ => format!("`{back}` in `{machine}~{back}` is not a number"),
        };
        Problem::usage(wrong).hint(format!("`{machine}~1` is the recovery point before the newest of {machine}"))
    })?;
    points.len().checked_sub(1).and_then(|last| last.checked_sub(back)).map(|at| points[at]).ok_or_else(|| {
        Problem::not_found(format!("machine {machine} has no recovery point {back} before its newest"))
            .hint(format!("it has {}; `lifeboat points {machine}` lists them", points.len()))
    })
}

fn at_time<'a>(points: &[&'a PointSummary], machine: &str, time: &str) -> Result<&'a PointSummary, Problem> {
    let at = parse_time(time).ok_or_else(|| {
        let wrong = match time {
            "" => format!("`{machine}@` lacks a time"),
            _ => format!("`{time}` in `{machine}@{time}` is not a time"),
        };
        Problem::usage(wrong)
            .hint("write 2026-11-21, 2026-11-21T03:00 or 2026-11-21T03:00:00Z; without a zone it is local time")
    })?;
    points.iter().rev().find(|point| point.time <= at).copied().ok_or_else(|| {
        Problem::not_found(format!("machine {machine} has no recovery point at or before {time}"))
            .hint(format!("`lifeboat points {machine}` lists them"))
    })
}

fn by_prefix<'a>(points: &'a [Arc<PointSummary>], spec: &str) -> Result<&'a PointSummary, Problem> {
    let not_found = || {
        Problem::not_found(format!("no recovery point or machine is called `{spec}`"))
            .hint("`lifeboat points` lists the recovery points")
    };
    let prefix = spec.to_ascii_lowercase();
    if !prefix.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(not_found());
    }
    let found: Vec<_> = points.iter().map(Arc::as_ref).filter(|point| point.id.starts_with(&prefix)).collect();
    match found.as_slice() {
        [] => Err(not_found()),
        [_] if prefix.len() < PREFIX_MIN => {
            Err(Problem::usage(format!("`{spec}` is too short for the id of a recovery point"))
                .hint(format!("give at least {PREFIX_MIN} characters of it, as in {}", short_id(&found[0].id))))
        }
        [point] => Ok(point),
        many => {
            let mut ids: Vec<String> = many
                .iter()
                .rev()
                .take(NAMED_MAX)
                .map(|point| format!("{} ({})", short_id(&point.id), point.machine))
                .collect();
            if many.len() > NAMED_MAX {
                ids.push(format!("{} older ones", many.len() - NAMED_MAX));
            }
            let enough = telling_apart(many).max(PREFIX_MIN);
            Err(Problem::usage(format!("`{spec}` is ambiguous: {} recovery points begin with it", many.len()))
                .hint(format!("{enough} characters of an id tell them apart: {}", ids.join(", "))))
        }
    }
}

/// How many first characters no two of these points share.
fn telling_apart(points: &[&PointSummary]) -> usize {
    let mut ids: Vec<&str> = points.iter().map(|point| point.id.as_str()).collect();
    ids.sort_unstable();
    let shared = |a: &str, b: &str| a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    ids.iter().zip(ids.iter().skip(1)).map(|(a, b)| shared(a, b) + 1).max().unwrap_or(0)
}

/// The first characters of an id, enough for a person.
pub fn short_id(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// A time as a person writes it. A day means its end, a minute or second its end too: `@TIME` asks for the newest
/// point that is not later.
fn parse_time(text: &str) -> Option<DateTime<Utc>> {
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Some(time.to_utc());
    }
    let local = |naive: NaiveDateTime| Local.from_local_datetime(&naive).latest().map(|time| time.to_utc());
    for (format, whole) in [
        ("%Y-%m-%dT%H:%M:%S%.f", 999),
        ("%Y-%m-%d %H:%M:%S%.f", 999),
        ("%Y-%m-%dT%H:%M", 59_999),
        ("%Y-%m-%d %H:%M", 59_999),
    ] {
        if let Ok(naive) = NaiveDateTime::parse_from_str(text, format) {
            let whole = if text.contains('.') { 0 } else { whole };
            return local(naive + chrono::Duration::milliseconds(whole));
        }
    }
    let day = NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?;
    local(day.and_hms_milli_opt(23, 59, 59, 999)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Kind;

    fn point(id: &str, machine: &str, time: &str) -> Arc<PointSummary> {
        Arc::new(PointSummary {
            id: id.into(),
            machine: machine.into(),
            time: DateTime::parse_from_rfc3339(time).unwrap().to_utc(),
            ..PointSummary::example()
        })
    }

    fn points() -> Vec<Arc<PointSummary>> {
        vec![
            point("abcd1111", "web01", "2026-11-19T10:00:00Z"),
            point("abcd2222", "db", "2026-11-19T11:00:00Z"),
            point("ef005555", "web01", "2026-11-20T10:00:00Z"),
            point("00ff7777", "odd~name@x", "2026-11-20T11:00:00Z"),
        ]
    }

    #[test]
    fn every_way_to_name_a_point_finds_it() {
        let points = points();
        let id = |spec| resolve(&points, spec).map(|point| point.id.clone());
        assert_eq!(id("web01").unwrap(), "ef005555");
        assert_eq!(id("web01~0").unwrap(), "ef005555");
        assert_eq!(id("web01~1").unwrap(), "abcd1111");
        assert_eq!(id("web01@2026-11-20T09:59:59Z").unwrap(), "abcd1111");
        assert_eq!(id("web01@2026-11-20T10:00:00Z").unwrap(), "ef005555");
        assert_eq!(id("web01@2026-11-25").unwrap(), "ef005555");
        assert_eq!(id("EF00").unwrap(), "ef005555");
        assert_eq!(id("odd~name@x").unwrap(), "00ff7777");
    }

    #[test]
    fn a_name_that_fits_nothing_or_too_much_says_which() {
        let points = points();
        let kind = |spec| resolve(&points, spec).unwrap_err().kind;
        assert_eq!(kind("nobody"), Kind::NotFound);
        assert_eq!(kind("dddd"), Kind::NotFound);
        assert_eq!(kind("web01~2"), Kind::NotFound);
        assert_eq!(kind("web01@2020-01-01"), Kind::NotFound);
        assert_eq!(kind("web01~x"), Kind::Usage);
        assert_eq!(kind("web01@noon"), Kind::Usage);
        assert_eq!(kind("abcd"), Kind::Usage);
        assert_eq!(kind("ef"), Kind::Usage);
        assert_eq!(kind(""), Kind::Usage);
        let told = |spec| resolve(&points, spec).unwrap_err().to_string();
        assert!(told("abcd").contains("5 characters of an id tell them apart: abcd2222 (db), abcd1111 (web01)"));
        assert!(told("ef").contains("at least 4 characters of it, as in ef005555"));
    }
}
