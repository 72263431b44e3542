//! Periods of the local calendar, and spans counted back on it.

use std::fmt;

use chrono::{DateTime, Datelike, Months, NaiveDateTime, Offset, TimeDelta, TimeZone, Timelike, Utc};

use super::Span;

/// A period that a rule keeps one point of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Period {
    /// An hour.
    Hourly,
    /// A day.
    Daily,
    /// A week from Monday (ISO 8601).
    Weekly,
    /// A month.
    Monthly,
    /// A year.
    Yearly,
}

impl Period {
    /// All, shortest first.
    pub const ALL: [Period; 5] = [Period::Hourly, Period::Daily, Period::Weekly, Period::Monthly, Period::Yearly];

    /// The name of the period that a time lies in; different periods have different names.
    pub fn name<Z: TimeZone>(self, time: DateTime<Utc>, zone: &Z) -> String {
        let local = time.with_timezone(zone);
        let offset = local.offset().fix();
        let local = local.naive_local();
        match self {
            // The hour that comes twice when clocks are set back differs in its distance from UTC.
            Period::Hourly => format!("{} {:02}:00 {offset}", local.date(), local.hour()),
            Period::Daily => local.date().to_string(),
            Period::Weekly => format!("{}-W{:02}", local.iso_week().year(), local.iso_week().week()),
            Period::Monthly => format!("{}-{:02}", local.year(), local.month()),
            Period::Yearly => local.year().to_string(),
        }
    }
}

impl fmt::Display for Period {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Period::Hourly => "hourly",
            Period::Daily => "daily",
            Period::Weekly => "weekly",
            Period::Monthly => "monthly",
            Period::Yearly => "yearly",
        })
    }
}

/// The time that lies a span before another: months and days by the local calendar at the same time of day (the last
/// day of a month that is too short), then hours. Of two such times the earlier; of none, the last one before.
pub fn before<Z: TimeZone>(time: DateTime<Utc>, span: Span, zone: &Z) -> DateTime<Utc> {
    let local = time.with_timezone(zone).naive_local();
    let day = local
        .checked_sub_months(Months::new(span.years.saturating_mul(12).saturating_add(span.months)))
        .and_then(|local| local.checked_sub_signed(TimeDelta::days(i64::from(span.weeks) * 7 + i64::from(span.days))));
    let begin = match day {
        Some(day) if day == local => time,
        Some(day) => resolve(day, zone),
        None => DateTime::<Utc>::MIN_UTC,
    };
    begin.checked_sub_signed(TimeDelta::hours(i64::from(span.hours))).unwrap_or(DateTime::<Utc>::MIN_UTC)
}

/// The time that clocks in the zone show `local`. They skip at most a day.
fn resolve<Z: TimeZone>(local: NaiveDateTime, zone: &Z) -> DateTime<Utc> {
    let quarters = (0..=26 * 4).filter_map(|quarter| local.checked_sub_signed(TimeDelta::minutes(15 * quarter)));
    let mut found = quarters.filter_map(|local| zone.from_local_datetime(&local).earliest());
    found.next().map_or(local.and_utc(), |time| time.to_utc())
}
