//! The bytes of a logical volume: segments of stripes.

use std::io;
use std::ops::Range;

use super::VOLUMES_MAX;
use super::text::{Section, Value};
use crate::bytes::size;
use crate::{DiskImage, SharedDisk};

/// Stripes of a segment; LVM takes up to 128.
const STRIPES_MAX: usize = 128;

/// A logical volume.
pub(super) struct LogicalVolume {
    segments: Vec<Segment>,
    size: u64,
    first_disk: Option<usize>,
}

/// A part of the volume that lies on its stripes in turn; a linear one has a single stripe.
struct Segment {
    start: u64,
    length: u64,
    stripe_size: u64,
    stripes: Vec<(SharedDisk, u64)>,
}

impl LogicalVolume {
    /// From its description. `locate` knows the group's physical volumes.
    pub(super) fn new(
        section: &Section,
        extent: u64,
        locate: impl Fn(&str) -> Result<(SharedDisk, usize, u64), String>,
    ) -> Result<LogicalVolume, String> {
        let nonsense = || "its description makes no sense".to_owned();
        let mut volume = LogicalVolume { segments: Vec::new(), size: 0, first_disk: None };
        let segments = section.sections.iter().filter(|section| section.name.starts_with("segment"));
        for segment in segments.take(VOLUMES_MAX) {
            match segment.text("type") {
                Some("striped" | "linear") => {}
                Some(other) => return Err(format!("it is of type {other}, and only linear and striped ones are read")),
                None => return Err(nonsense()),
            }
            let bytes = |key: &str| segment.number(key).and_then(|extents| extents.checked_mul(extent));
            let (start, length) =
                (bytes("start_extent").ok_or_else(nonsense)?, bytes("extent_count").ok_or_else(nonsense)?);
            let mut stripes = Vec::new();
            for pair in segment.values_of("stripes").chunks(2) {
                let [Value::Text(name), Value::Number(at)] = pair else { return Err(nonsense()) };
                let (disk, on, begin) = locate(name)?;
                volume.first_disk.get_or_insert(on);
                let offset = at.checked_mul(extent).and_then(|at| at.checked_add(begin)).ok_or_else(nonsense)?;
                stripes.push((disk, offset));
            }
            let stripe_size = segment.number("stripe_size").and_then(|sectors| sectors.checked_mul(512)).unwrap_or(0);
            let striped = stripes.len() > 1;
            let share = (length / stripes.len().max(1) as u64, length % stripes.len().max(1) as u64);
            if stripes.is_empty()
                || stripes.len() > STRIPES_MAX
                || length == 0
                || start != volume.size
                || share.1 != 0
                || (striped && (stripe_size == 0 || !share.0.is_multiple_of(stripe_size)))
            {
                return Err(nonsense());
            }
            if stripes.iter().any(|(disk, offset)| offset.checked_add(share.0).is_none_or(|end| end > disk.size())) {
                return Err("it reaches past the end of a physical volume".to_owned());
            }
            let stripe_size = if striped { stripe_size } else { length };
            volume.segments.push(Segment { start, length, stripe_size, stripes });
            volume.size = start.checked_add(length).ok_or_else(nonsense)?;
        }
        Ok(volume)
    }

    /// The machine's disk that holds the volume's beginning.
    pub(super) fn first_disk(&self) -> Option<usize> {
        self.first_disk
    }

    /// Where `offset` lies, and how many bytes follow there in one piece.
    fn place(&self, offset: u64) -> Option<(&SharedDisk, u64, u64)> {
        let at = self.segments.partition_point(|segment| segment.start + segment.length <= offset);
        let segment = self.segments.get(at)?;
        let within = offset - segment.start;
        let (row, rest) = (within / segment.stripe_size, within % segment.stripe_size);
        let count = segment.stripes.len() as u64;
        let (disk, begin) = segment.stripes.get(size(row % count))?;
        Some((disk, begin + (row / count) * segment.stripe_size + rest, segment.stripe_size - rest))
    }
}

impl DiskImage for LogicalVolume {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let (disk, place, length) = self.place(at).ok_or_else(|| {
                io::Error::new(io::ErrorKind::UnexpectedEof, "the read reaches past the volume's end")
            })?;
            let length = length.min(rest.len() as u64);
            let (filled, left) = std::mem::take(&mut rest).split_at_mut(size(length));
            disk.read_at(place, filled)?;
            at += length;
            rest = left;
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let mut at = offset;
        while let Some((disk, place, length)) = self.place(at) {
            match disk.next_data(place)? {
                Some(data) if data.start < place + length => {
                    let start = at + (data.start.max(place) - place);
                    return Ok(Some(start..(at + (data.end - place)).min(at + length)));
                }
                // A hole of a linear volume is one step, of a striped one as many as it has stripes.
                _ => at += length,
            }
        }
        Ok(None)
    }

    fn describe(&self) -> String {
        "LVM2 logical volume".to_owned()
    }
}
