//! Times as other systems write them.

use super::Timestamp;

/// Days from 1970-01-01 to a date of the Gregorian calendar.
pub(super) fn days(year: i64, month: i64, day: i64) -> i64 {
    // Years begin in March, so that the day that comes and goes is the last.
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// A date and time, UTC. Numbers that no calendar has count on.
pub(super) fn civil(date: (i64, i64, i64), time: (i64, i64, i64)) -> Timestamp {
    let seconds = days(date.0, date.1, date.2) * 86_400 + time.0 * 3600 + time.1 * 60 + time.2;
    Timestamp { seconds, nanoseconds: 0 }
}

/// Date and time of DOS: they are local time of a zone that nothing tells, and taken to be UTC. `tens` has 10 ms.
pub(super) fn dos(date: u16, time: u16, tens: u8) -> Timestamp {
    if date == 0 {
        return Timestamp::default();
    }
    let (date, time) = (i64::from(date), i64::from(time));
    let whole = civil(
        (1980 + (date >> 9), ((date >> 5) & 15).max(1), (date & 31).max(1)),
        (time >> 11, (time >> 5) & 63, (time & 31) * 2),
    );
    let tens = u32::from(tens.min(199));
    Timestamp { seconds: whole.seconds + i64::from(tens / 100), nanoseconds: tens % 100 * 10_000_000 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_counted_from_1970() {
        assert_eq!(days(1970, 1, 1), 0);
        assert_eq!(days(2000, 2, 29), 11_016);
        assert_eq!(days(2026, 11, 21), 20_778);
        assert_eq!(days(1969, 12, 31), -1);
        assert_eq!(civil((2026, 11, 21), (8, 20, 0)).seconds, 1_795_249_200);
        assert_eq!(dos(0x5d75, 0x4280, 150), Timestamp { seconds: 1_795_249_201, nanoseconds: 500_000_000 });
    }
}
