//! Names: long ones in the entries before, short ones in the entry itself.

use crate::bytes::{le, part, u8, utf16};

/// Letters above ASCII of code page 437, which short names are in.
const CP437: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";
/// Entries of the longest name.
const PARTS_MAX: u8 = 20;

/// A long name on its way: its parts stand last first.
#[derive(Default)]
pub(super) struct Name {
    parts: Vec<[u16; 13]>,
    next: u8,
    checksum: u8,
}

impl Name {
    /// Takes an entry with a part of the name. One that does not follow begins anew, or is dropped.
    pub(super) fn add(&mut self, entry: &[u8]) {
        let (order, checksum) = (u8(entry, 0), u8(entry, 13));
        let number = order & 0x3f;
        if order & 0x40 != 0 {
            *self = Name { parts: Vec::new(), next: number, checksum };
        }
        if number == 0 || number > PARTS_MAX || number != self.next || checksum != self.checksum {
            *self = Name::default();
            return;
        }
        let mut units = [0; 13];
        let places = (0..5).map(|at| 1 + 2 * at).chain((0..6).map(|at| 14 + 2 * at)).chain([28, 30]);
        for (unit, place) in units.iter_mut().zip(places) {
            *unit = le::u16(entry, place);
        }
        self.parts.push(units);
        self.next = number - 1;
    }

    /// The name of the file whose own entry follows: the long one if it is complete and belongs to it.
    pub(super) fn finish(self, entry: &[u8]) -> String {
        let sum = part(entry, 0, 11).iter().fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
        if self.parts.is_empty() || self.next != 0 || self.checksum != sum {
            return short(entry);
        }
        let units: Vec<u16> = self.parts.iter().rev().flatten().copied().take_while(|unit| *unit != 0).collect();
        utf16(&units)
    }
}

fn short(entry: &[u8]) -> String {
    const LOWER_BASE: u8 = 0x08;
    const LOWER_EXTENSION: u8 = 0x10;
    let case = u8(entry, 12);
    let text = |bytes: &[u8], lower: bool| {
        let letters = bytes.iter().map(|byte| match byte {
            0..0x80 => char::from(*byte),
            high => CP437.chars().nth(usize::from(*high - 0x80)).unwrap_or('_'),
        });
        let name: String = letters.collect();
        let name = name.trim_end_matches(' ');
        if lower { name.to_ascii_lowercase() } else { name.to_owned() }
    };
    let mut base = part(entry, 0, 8).to_vec();
    if base.first() == Some(&0x05) {
        base[0] = 0xe5;
    }
    let base = text(&base, case & LOWER_BASE != 0);
    match text(part(entry, 8, 3), case & LOWER_EXTENSION != 0).as_str() {
        "" => base,
        extension => format!("{base}.{extension}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_have_their_case_and_letters() {
        let mut entry = *b"README  TXT\x20\x18                    ";
        assert_eq!(short(&entry), "readme.txt");
        entry[12] = 0;
        assert_eq!(short(&entry), "README.TXT");
        entry[0] = 0x80;
        assert_eq!(short(&entry), "ÇEADME.TXT");
        assert_eq!(CP437.chars().count(), 128);
    }
}
