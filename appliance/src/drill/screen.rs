//! What a guest's screen shows: pixels as QEMU dumps them, looked at for life.

use std::io;
use std::path::Path;

/// Largest dump that is looked at: more than any screen.
const DUMP_MAX: u64 = 128 << 20;
/// A screen with fewer pixels in this many that differ from its background shows nothing but a cursor.
const LIT: usize = 1000;
/// A screen of which fewer than one pixel in this many has changed shows the same as before: a cursor, or a clock.
const CHANGED: usize = 200;

/// A screen at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Screen {
    width: usize,
    pixels: Vec<[u8; 3]>,
}

impl Screen {
    /// Reads a dump.
    pub fn load(path: &Path) -> io::Result<Screen> {
        if std::fs::metadata(path)?.len() > DUMP_MAX {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the screen is too large"));
        }
        let bytes = std::fs::read(path)?;
        Screen::parse(&bytes).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is no PPM file"))
    }

    /// From the bytes of a binary PPM file with 255 as its highest value: `P6 WIDTH HEIGHT 255`, one white space, pixels.
    fn parse(bytes: &[u8]) -> Option<Screen> {
        let mut rest = bytes.strip_prefix(b"P6")?;
        let mut number = || {
            let at = rest.iter().position(|byte| !byte.is_ascii_whitespace())?;
            let digits = rest.get(at..)?;
            let end = digits.iter().position(|byte| !byte.is_ascii_digit())?;
            rest = digits.get(end..)?;
            std::str::from_utf8(digits.get(..end)?).ok()?.parse::<usize>().ok()
        };
        let (width, height, highest) = (number()?, number()?, number()?);
        let (pixels, _) = rest.get(1..)?.as_chunks::<3>();
        (highest == 255 && width > 0 && width.checked_mul(height) == Some(pixels.len()))
            .then(|| Screen { width, pixels: pixels.to_vec() })
    }

    /// Whether it shows nothing, or a cursor at the most.
    pub fn is_blank(&self) -> bool {
        // The background is most of what stands at regular places.
        let mut sample: Vec<[u8; 3]> = self.pixels.iter().step_by(self.pixels.len() / 1021 + 1).copied().collect();
        sample.sort_unstable();
        let background = sample.chunk_by(|a, b| a == b).max_by_key(|same| same.len()).and_then(|same| same.first());
        let lit = self.pixels.iter().filter(|pixel| Some(*pixel) != background).count();
        lit * LIT < self.pixels.len() || lit == 0
    }

    /// Whether it shows the same as another, but for a blinking cursor or a clock.
    pub fn shows_the_same_as(&self, other: &Screen) -> bool {
        let changed = self.pixels.iter().zip(&other.pixels).filter(|(a, b)| a != b).count();
        self.width == other.width && self.pixels.len() == other.pixels.len() && changed * CHANGED < self.pixels.len()
    }

    /// Its size, for a person.
    pub fn size(&self) -> String {
        format!("{} x {}", self.width, self.pixels.len() / self.width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn screen(change: impl FnOnce(&mut [u8])) -> Screen {
        let mut bytes = b"P6\n720 400\n255\n".to_vec();
        let header = bytes.len();
        bytes.resize(header + 720 * 400 * 3, 7);
        change(&mut bytes[header..]);
        Screen::parse(&bytes).unwrap()
    }

    /// Draws this many pixels from a place on.
    fn draw(pixels: &mut [u8], from: usize, count: usize) {
        pixels[from * 3..(from + count) * 3].fill(200);
    }

    #[test]
    fn a_blank_screen_is_told_from_text_and_a_cursor_does_not_count() {
        assert_eq!(screen(|_| ()).size(), "720 x 400");
        assert!(screen(|_| ()).is_blank());
        assert!(screen(|pixels| draw(pixels, 5000, 16)).is_blank());
        let text = screen(|pixels| draw(pixels, 5000, 2000));
        assert!(!text.is_blank());
        assert!(!screen(|pixels| draw(pixels, 0, 720 * 200)).is_blank());
        assert!(text.shows_the_same_as(&screen(|pixels| draw(pixels, 5000, 2100))));
        assert!(!text.shows_the_same_as(&screen(|pixels| draw(pixels, 5000, 9000))));
    }

    #[test]
    fn what_is_no_dump_is_refused() {
        let good = b"P6\n2 1\n255\nabcdef".to_vec();
        assert!(Screen::parse(&good).is_some());
        for cut in 0..good.len() {
            assert!(Screen::parse(&good[..cut]).is_none(), "cut at {cut}");
        }
        for bad in ["P5\n2 1\n255\nabcdef", "P6\n9 9\n255\nabcdef", "P6\n2 1\n65535\nabcdef", "P6\n0 0\n255\n"] {
            assert!(Screen::parse(bad.as_bytes()).is_none(), "{bad}");
        }
        assert!(Screen::parse(format!("P6 {} {} 255 a", usize::MAX, usize::MAX).as_bytes()).is_none());
    }
}
