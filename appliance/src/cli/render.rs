//! What a person reads.
#![expect(clippy::print_stderr, reason = "the command line's one place that prints")]

use chrono::{DateTime, Local, Utc};
use serde::Serialize;

/// A line on standard output.
pub fn line(text: &str) {
    use std::io::Write;
    match writeln!(std::io::stdout().lock(), "{text}") {
        // A reader that has gone away (`| head`) is not an error.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            complain(&format!("lifeboat: cannot write the answer: {error}"));
            std::process::exit(1);
        }
        _ => {}
    }
}

/// A line on standard error, beside the answer.
pub fn note(text: &str) {
    eprintln!("{text}");
}

/// An error on standard error.
pub fn complain(text: &str) {
    eprintln!("{text}");
}

/// A value as one line of JSON on standard output.
pub fn json(value: &impl Serialize) {
    match serde_json::to_string(value) {
        Ok(text) => line(&text),
        Err(error) => complain(&format!("lifeboat: cannot write JSON: {error}")),
    }
}

/// Bytes with a binary unit, three figures.
#[expect(clippy::cast_precision_loss, reason = "three figures are shown")]
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A number of things.
pub fn count(number: u64, thing: &str) -> String {
    if number == 1 { format!("1 {thing}") } else { format!("{number} {thing}s") }
}

/// A time in the local zone.
pub fn time(time: DateTime<Utc>) -> String {
    time.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S").to_string()
}

/// Milliseconds as seconds; a dash when there are none.
#[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
pub fn millis(millis: Option<u64>) -> String {
    millis.map_or("-".to_owned(), |millis| format!("{:.2} s", millis as f64 / 1000.0))
}

/// Rows in columns as wide as they need to be. The columns named in `right` are set to the right.
pub fn table(head: &[&str], rows: &[Vec<String>], right: &[usize]) {
    lines(&table_lines(head, rows, right));
}

/// The same, as lines.
pub fn table_lines(head: &[&str], rows: &[Vec<String>], right: &[usize]) -> Vec<String> {
    let mut widths: Vec<usize> = head.iter().map(|title| title.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let set = |cells: Vec<&str>| {
        let mut text = String::new();
        for (at, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            let cell = if right.contains(&at) { format!("{cell:>width$}") } else { format!("{cell:<width$}") };
            text.push_str(&cell);
            text.push_str("  ");
        }
        text.trim_end().to_owned()
    };
    let rows = rows.iter().map(|row| set(row.iter().map(String::as_str).collect()));
    std::iter::once(set(head.to_vec())).chain(rows).collect()
}

/// Pairs of a name and a value, a line each.
pub fn pairs(pairs: &[(&str, String)]) {
    lines(&pair_lines(pairs));
}

/// The same, as lines.
pub fn pair_lines(pairs: &[(&str, String)]) -> Vec<String> {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    pairs.iter().map(|(name, value)| format!("{name:<width$}  {value}").trim_end().to_owned()).collect()
}

/// Lines on standard output.
pub fn lines(lines: &[String]) {
    for text in lines {
        line(text);
    }
}

/// Seconds as a person says them.
pub fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// Microseconds in a unit that fits.
#[expect(clippy::cast_precision_loss, reason = "one digit is shown")]
pub fn micros(micros: u64) -> String {
    match micros {
        0..1000 => format!("{micros} us"),
        1000..1_000_000 => format!("{:.1} ms", micros as f64 / 1e3),
        _ => format!("{:.1} s", micros as f64 / 1e6),
    }
}

/// How much of `total` is done, as a bar and a number.
pub fn share(done: u64, total: u64) -> String {
    const WIDTH: u64 = 24;
    let part = |of: u64| u64::try_from(u128::from(done.min(total)) * u128::from(of) / u128::from(total.max(1)));
    let (filled, percent) = (part(WIDTH).unwrap_or(WIDTH), part(100).unwrap_or(100));
    let bar: String = (0..WIDTH).map(|at| if at < filled { '=' } else { ' ' }).collect();
    format!("[{bar}] {percent} %, {} of {}", bytes(done), bytes(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_shares_are_shown_as_people_read_them() {
        assert_eq!([7, 60, 3599, 3661].map(duration), ["7 s", "1 min 00 s", "59 min 59 s", "1 h 01 min"]);
        assert_eq!([999, 1500, 2_500_000].map(micros), ["999 us", "1.5 ms", "2.5 s"]);
        assert_eq!(share(1 << 20, 4 << 20), "[======                  ] 25 %, 1.00 MiB of 4.00 MiB");
        assert!(share(0, 0).ends_with("0 %, 0 B of 0 B"));
        assert!(share(u64::MAX, u64::MAX).contains("] 100 %"));
    }

    #[test]
    fn bytes_are_shown_with_three_figures() {
        let shown = [0, 1023, 1024, 1536, 99 << 10, 999 << 20, 1000 << 20, 3 << 30, u64::MAX].map(bytes);
        assert_eq!(
            shown,
            ["0 B", "1023 B", "1.00 KiB", "1.50 KiB", "99.0 KiB", "999 MiB", "0.98 GiB", "3.00 GiB", "16.0 EiB"]
        );
    }
}
