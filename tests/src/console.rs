//! A guest's serial console, which QEMU writes to a file.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::PATIENCE;

/// Follows a console file from a place on.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    seen: usize,
}

impl Console {
    /// From its beginning; the file need not be there yet.
    pub fn new(path: impl AsRef<Path>) -> Console {
        Console { path: path.as_ref().to_owned(), seen: 0 }
    }

    /// All that has been written.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.path).unwrap_or_default()).replace('\r', "")
    }

    /// Waits for a line that contains `needle`, after those found before, and returns it.
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
