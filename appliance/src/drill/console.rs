//! Follows the file that a guest's first serial port is written to. The guest is not trusted: what is held of it is
//! bounded.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use blockstore::drill::MAX_CONSOLE_LEN;

/// More than this on its console is a flood.
pub const FLOOD: u64 = 64 << 20;
/// What of a log is kept: its beginning and its end, and room for the note between them.
const HEAD: usize = 64 << 10;
const TAIL: usize = MAX_CONSOLE_LEN - HEAD - 128;
/// What expressions are looked for in, at the least.
const WINDOW: usize = 64 << 10;
/// Most that is taken at once.
const STEP: u64 = 1 << 20;

/// A console, as far as it was read.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    length: u64,
    head: Vec<u8>,
    tail: Vec<u8>,
    text: String,
    escape: Escape,
}

/// Where in a terminal's escape sequence the last byte was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Escape {
    None,
    Begun,
    Inside,
}

impl Console {
    /// From the beginning of a file that need not be there yet.
    pub fn new(path: &Path) -> Console {
        Console {
            path: path.to_owned(),
            length: 0,
            head: Vec::new(),
            tail: Vec::new(),
            text: String::new(),
            escape: Escape::None,
        }
    }

    /// Reads what is new; whether there was anything.
    pub fn read_on(&mut self) -> io::Result<bool> {
        let mut new = Vec::new();
        let mut read = || -> io::Result<()> {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(self.length))?;
            file.take(STEP).read_to_end(&mut new).map(drop)
        };
        match read() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            read => read?,
        }
        self.take(&new);
        Ok(!new.is_empty())
    }

    fn take(&mut self, new: &[u8]) {
        self.length += new.len() as u64;
        let room = (HEAD - self.head.len()).min(new.len());
        let (head, tail) = new.split_at(room);
        self.head.extend_from_slice(head);
        self.tail.extend_from_slice(tail);
        if self.tail.len() > 2 * TAIL {
            self.tail.drain(..self.tail.len() - TAIL);
        }
        let mut plain = Vec::with_capacity(new.len());
        for byte in new {
            match (self.escape, byte) {
                (Escape::None, 0x1b) => self.escape = Escape::Begun,
                (Escape::None, b'\r') => {}
                (Escape::None, byte) => plain.push(*byte),
                (Escape::Begun, b'[') => self.escape = Escape::Inside,
                (Escape::Begun, _) => self.escape = Escape::None,
                (Escape::Inside, 0x40..=0x7e) => self.escape = Escape::None,
                (Escape::Inside, _) => {}
            }
        }
        self.text.push_str(&String::from_utf8_lossy(&plain));
        if self.text.len() > 2 * WINDOW {
            let mut cut = self.text.len() - WINDOW;
            while !self.text.is_char_boundary(cut) {
                cut += 1;
            }
            self.text.drain(..cut);
        }
    }

    /// Bytes written so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The end of what the guest wrote, without escape sequences: at least the last 64 KiB.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The log as it is kept.
    pub fn log(&self) -> Vec<u8> {
        let tail = &self.tail[self.tail.len().saturating_sub(TAIL)..];
        let left_out = self.length - (self.head.len() + tail.len()) as u64;
        let note = match left_out {
            0 => String::new(),
            count => format!("\n[lifeboat: {count} bytes are left out here]\n"),
        };
        [&self.head, note.as_bytes(), tail].concat()
    }
}

/// The last lines of a console log that are not empty, without escape sequences.
pub fn last_lines(log: &[u8], count: usize) -> Vec<String> {
    const LINE_MAX: usize = 200;
    let mut console = Console::new(Path::new(""));
    console.take(&log[log.len().saturating_sub(WINDOW)..]);
    let printable = |line: &str| line.chars().filter(|c| !c.is_control()).take(LINE_MAX).collect::<String>();
    let lines = console.text.lines().rev().map(printable).filter(|line| !line.trim().is_empty());
    let mut lines: Vec<String> = lines.take(count).collect();
    lines.reverse();
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_are_left_out_wherever_they_are_cut() {
        let written = b"\x1b[2J\x1b[01;01HGNU GRUB\r\n\x1bcLoading \x1b[1mLinux\x1b[0m\r\n";
        for cut in 0..written.len() {
            let mut console = Console::new(Path::new("/nowhere"));
            console.take(&written[..cut]);
            console.take(&written[cut..]);
            assert_eq!(console.text(), "GNU GRUB\nLoading Linux\n", "cut at {cut}");
            assert_eq!(console.log(), written);
        }
        assert_eq!(last_lines(written, 1), ["Loading Linux"]);
    }

    #[test]
    fn a_long_log_keeps_its_beginning_and_its_end() {
        let mut console = Console::new(Path::new("/nowhere"));
        for number in 0..100_000 {
            console.take(format!("line {number}\n").as_bytes());
        }
        let log = console.log();
        assert!(log.len() <= MAX_CONSOLE_LEN && log.starts_with(b"line 0\n") && log.ends_with(b"line 99999\n"));
        assert!(String::from_utf8_lossy(&log).contains("bytes are left out here"));
        assert!(console.text().len() <= 2 * WINDOW && console.text().ends_with("line 99999\n"));
        assert_eq!(last_lines(&log, 2), ["line 99998", "line 99999"]);
    }

    #[test]
    fn a_file_is_followed_from_before_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let mut console = Console::new(&path);
        assert!(!console.read_on().unwrap());
        std::fs::write(&path, "a").unwrap();
        assert!(console.read_on().unwrap() && !console.read_on().unwrap());
        std::fs::write(&path, "ab").unwrap();
        assert!(console.read_on().unwrap());
        assert_eq!((console.text(), console.length()), ("ab", 2));
    }
}
