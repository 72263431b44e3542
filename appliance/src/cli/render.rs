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
        line(text.trim_end());
    };
    set(head.to_vec());
    for row in rows {
        set(row.iter().map(String::as_str).collect());
    }
}

/// Pairs of a name and a value, a line each.
pub fn pairs(pairs: &[(&str, String)]) {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in pairs {
        line(&format!("{name:<width$}  {value}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_with_three_figures() {
        let shown = [0, 1023, 1024, 1536, 99 << 10, 999 << 20, 1000 << 20, 3 << 30, u64::MAX].map(bytes);
        assert_eq!(
            shown,
            ["0 B", "1023 B", "1.00 KiB", "1.50 KiB", "99.0 KiB", "999 MiB", "0.98 GiB", "3.00 GiB", "16.0 EiB"]
        );
    }
}
