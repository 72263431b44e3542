//! Numbers and names out of structures of foreign disks.
//!
//! A field that lies beyond the end of its bytes reads as zero: no decoder panics on a short structure. What has to be
//! there is checked by its decoder before.

/// A slice of `bytes`; what lies beyond their end is left out.
pub(crate) fn part(bytes: &[u8], at: usize, length: usize) -> &[u8] {
    let rest = bytes.get(at..).unwrap_or_default();
    rest.get(..length).unwrap_or(rest)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    at.checked_add(N).and_then(|end| bytes.get(at..end)).and_then(|found| found.try_into().ok()).unwrap_or([0; N])
}

/// A byte.
pub(crate) fn u8(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}

macro_rules! numbers {
    ($module:ident, $from:ident, $doc:literal) => {
        #[doc = $doc]
        pub(crate) mod $module {
            use super::array;

            pub(crate) fn u16(bytes: &[u8], at: usize) -> u16 {
                u16::$from(array(bytes, at))
            }

            pub(crate) fn u32(bytes: &[u8], at: usize) -> u32 {
                u32::$from(array(bytes, at))
            }

            pub(crate) fn u64(bytes: &[u8], at: usize) -> u64 {
                u64::$from(array(bytes, at))
            }
        }
    };
}
numbers!(le, from_le_bytes, "Little-endian numbers.");
numbers!(be, from_be_bytes, "Big-endian numbers.");

/// Text that ends at a zero byte or is filled up with blanks, as labels are; `None` when nothing is left.
pub(crate) fn label(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(part(bytes, 0, end));
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// UTF-16 in UTF-8. Half of a surrogate pair alone, which no text has but a disk may, becomes U+FFFD.
pub(crate) fn utf16(units: &[u16]) -> String {
    char::decode_utf16(units.iter().copied()).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

/// UTF-16 units of little-endian bytes.
pub(crate) fn utf16_le(bytes: &[u8]) -> String {
    let units: Vec<u16> = bytes.chunks_exact(2).map(|pair| le::u16(pair, 0)).collect();
    utf16(&units)
}

/// A UUID whose bytes stand in the order they are written.
pub(crate) fn uuid(bytes: &[u8]) -> Option<String> {
    let bytes: [u8; 16] = bytes.try_into().ok()?;
    if bytes == [0; 16] {
        return None;
    }
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Some(format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]))
}

/// A GUID of a partition table, whose first three groups are little-endian.
pub(crate) fn guid(bytes: &[u8]) -> Option<String> {
    let mut bytes: [u8; 16] = bytes.try_into().ok()?;
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    uuid(&bytes)
}

/// As much of a number as a `usize` holds; lengths are bounded before they are used.
pub(crate) fn size(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_beyond_the_end_read_as_zero() {
        assert_eq!(le::u16(&[1, 2], 0), 0x0201);
        assert_eq!(be::u32(&[1, 2, 3, 4], 0), 0x0102_0304);
        assert_eq!(le::u32(&[1, 2, 3], 0), 0);
        assert_eq!(le::u64(&[], usize::MAX), 0);
        assert_eq!(part(&[1, 2, 3], 2, 9), [3]);
        assert_eq!(part(&[1, 2, 3], 9, 1), [0_u8; 0]);
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        assert_eq!(label(b"root  \0\0junk"), Some("root".to_owned()));
        assert_eq!(label(&[0; 8]), None);
        assert_eq!(utf16_le(&[0x41, 0, 0x3d, 0xd8, 0x00, 0xde]), "A\u{1f600}");
        let bytes: Vec<u8> = (0..16).collect();
        assert_eq!(uuid(&bytes).unwrap(), "00010203-0405-0607-0809-0a0b0c0d0e0f");
        assert_eq!(guid(&bytes).unwrap(), "03020100-0504-0706-0809-0a0b0c0d0e0f");
    }
}
