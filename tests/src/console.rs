//! A guest's serial console, which QEMU writes to a file.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::PATIENCE;

/// What a guest says when its disk or its kernel is in trouble. Waiting for anything else ends at once with one of these.
const TROUBLE: [&str; 7] = [
    "DAMAGED",
    "write failed",
    "LIFEBOAT-GUEST: stopped",
    "LIFEBOAT-GUEST: no root file system",
    "LIFEBOAT-GUEST: the root file system",
    "LIFEBOAT-GUEST: cannot",
    "Kernel panic",
];

/// Follows a console file from a place on.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    seen: usize,
}

impl Console {
    /// Lets the guest count on, and returns the last record that it says is durable.
    #[track_caller]
    pub fn count_on(&mut self, more: u64) -> u64 {
        let reached = self.last_number("seq ").unwrap_or(0);
        self.wait_for(&format!("seq {}", reached + more));
        self.last_number("seq ").unwrap_or(0)
    }

    /// From its beginning; the file need not be there yet.
    pub fn new(path: impl AsRef<Path>) -> Console {
        Console { path: path.as_ref().to_owned(), seen: 0 }
    }

    /// All that has been written.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.path).unwrap_or_default()).replace('\r', "")
    }

    /// Waits for a line that contains `needle`, after those found before, and returns it. A guest in trouble is not waited
    /// for, unless the trouble is what is wanted.
    #[track_caller]
    pub fn wait_for(&mut self, needle: &str) -> String {
        let since = Instant::now();
        loop {
            let text = self.text();
            let mut at = self.seen;
            for line in text.get(self.seen..).unwrap_or_default().split_inclusive('\n') {
                at += line.len();
                if line.ends_with('\n') && line.contains(needle) {
                    self.seen = at;
                    return line.trim_end().to_owned();
                }
                let trouble = TROUBLE.iter().any(|words| line.ends_with('\n') && line.contains(words));
                assert!(!trouble, "{}: waiting for {needle:?}, the guest says:\n{line}", self.path.display());
            }
            let tail: Vec<&str> = text.lines().rev().take(25).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            assert!(
                since.elapsed() < PATIENCE,
                "{}: waited in vain for {needle:?}; its last lines:\n{}",
                self.path.display(),
                tail.join("\n")
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for a line `LIFEBOAT-GUEST: WORDN`, and returns N: `next_number("seq ")`, `next_number("log ok last=")`.
    #[track_caller]
    pub fn next_number(&mut self, word: &str) -> u64 {
        let line = self.wait_for(&format!("LIFEBOAT-GUEST: {word}"));
        number_after(&line, word).unwrap_or_else(|| panic!("no number after {word:?} in {line:?}"))
    }

    /// The number after `word` in the last line that has it.
    pub fn last_number(&self, word: &str) -> Option<u64> {
        self.text().lines().rev().find_map(|line| number_after(line, word))
    }
}

/// The number that follows `word` in `line`.
pub fn number_after(line: &str, word: &str) -> Option<u64> {
    let rest = line.split_once(word)?.1.trim_start();
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    fn console(text: &str) -> (tempfile::TempDir, Console) {
        let dir = tempfile::tempdir().expect("a folder can be made");
        let path = dir.path().join("console");
        fs::write(&path, text).expect("the file can be written");
        (dir, Console::new(path))
    }

    #[test]
    fn lines_are_found_in_order_and_once() {
        let (_dir, mut console) = console("LIFEBOAT-GUEST: seq 1\r\nnoise\r\nLIFEBOAT-GUEST: seq 2\r\n");
        assert_eq!(console.next_number("seq "), 1);
        assert_eq!(console.next_number("seq "), 2);
        assert_eq!(console.last_number("seq "), Some(2));
    }

    #[test]
    fn half_a_line_waits_for_its_other_half() {
        let (_dir, mut console) = console("LIFEBOAT-GUEST: seq 1");
        let path = console.path.clone();
        let writer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            let file = fs::OpenOptions::new().append(true).open(path);
            file.and_then(|mut file| file.write_all(b"2\r\n"))
        });
        assert_eq!(console.next_number("seq "), 12);
        writer.join().expect("no panic").expect("the file can be written");
    }

    #[test]
    #[should_panic(expected = "log DAMAGED record 3")]
    fn damage_ends_a_wait_for_something_else() {
        console("LIFEBOAT-GUEST: log DAMAGED record 3\n").1.wait_for("log ok");
    }

    #[test]
    fn damage_can_be_waited_for() {
        let (_dir, mut console) = console("a\nLIFEBOAT-GUEST: log DAMAGED record 3\n");
        assert!(console.wait_for("DAMAGED").ends_with("record 3"));
    }
}
