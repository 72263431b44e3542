//! An overlay whose files anybody may have written: opened, used, and opened again.
//!
//! An input is: flags (1 byte: 1 seal the journal, 2 put its batches in order, 4 and 8 seal the recent changes), disk size
//! (3 bytes), lengths of the two files of recent changes (2 bytes each), these files, the journal.

use std::path::Path;
use std::sync::Arc;

use blockstore::ReadError;
use blockstore::base::{Base, Extent, Segment};
use blockstore::disk::Folder;
use blockstore::overlay::{Overlay, OverlayError, OverlayIdentity};
use blockstore::sim::SimFolder;

use crate::objects::write;
use crate::{Input, seal};

#[derive(Debug)]
struct Hole(u64);

impl Base for Hole {
    fn size(&self) -> u64 {
        self.0
    }

    fn read_resident(&self, _offset: u64, length: u64, out: &mut Vec<Segment>) -> bool {
        out.push(Segment::Hole(length));
        true
    }

    fn read(&self, _offset: u64, length: u64, out: &mut Vec<Segment>) -> Result<(), ReadError> {
        out.push(Segment::Hole(length));
        Ok(())
    }

    fn extents(&self, _offset: u64, length: u64, _limit: usize) -> Result<Vec<Extent>, ReadError> {
        Ok(vec![Extent { length, hole: true }])
    }
}

fn identity(size: u64) -> OverlayIdentity {
    OverlayIdentity { point: [0xab; 32], disk: "disk0".into(), size }
}

fn open(folder: &SimFolder, size: u64) -> Result<Overlay, OverlayError> {
    Overlay::open(Arc::new(folder.clone()), Path::new("o"), identity(size), Arc::new(Hole(size)))
}

fn read(overlay: &Overlay) -> Vec<u8> {
    let mut segments = Vec::new();
    let read = overlay.read(0, overlay.size(), &mut segments);
    read.unwrap_or_else(|error| panic!("an overlay that opened cannot be read: {error}"));
    let mut bytes = Vec::new();
    for segment in segments {
        match segment {
            Segment::Data(data) => bytes.extend_from_slice(&data),
            Segment::Hole(length) => bytes.resize(bytes.len() + usize::try_from(length).unwrap_or(0), 0),
        }
    }
    assert_eq!(bytes.len() as u64, overlay.size());
    bytes
}

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.number(1);
    let size = 1 + input.number(3) % (1 << 20);
    let lengths = [input.length(2), input.length(2)];
    let folder = SimFolder::new(1);
    let boot = folder.boot_id().unwrap_or_default();
    for (number, length) in lengths.into_iter().enumerate() {
        let mut bytes = input.bytes(length).to_vec();
        if flags & (4 << number) != 0 {
            seal::recent(&mut bytes, &boot);
        }
        if !bytes.is_empty() {
            write(&folder, &format!("o/recent.{number}"), &bytes);
        }
    }
    let mut journal = input.rest().to_vec();
    if flags & 1 != 0 {
        seal::put(&mut journal, 24, &size.to_le_bytes());
        seal::journal(&mut journal, flags & 2 != 0);
    }
    write(&folder, "o/journal", &journal);
    let mut content = vec![9; usize::try_from(size).unwrap_or(0)];
    content.iter_mut().skip(4096).step_by(4096).for_each(|byte| *byte = 1);
    write(&folder, "o/data", &content);

    let Ok(overlay) = open(&folder, size) else { return };
    let _ = (overlay.usage(), overlay.changed(0, size, 100), overlay.extents(0, size, 100).is_ok());
    let before = read(&overlay);
    drop(overlay);
    // What was accepted once is accepted again and says the same, and takes writes.
    let again = open(&folder, size).unwrap_or_else(|error| panic!("it opened before, and now: {error}"));
    assert!(read(&again) == before, "opened twice, it holds two things");
    let middle = size / 2;
    again.write(middle, &[0x55]).unwrap_or_else(|error| panic!("it takes no write: {error}"));
    again.flush().unwrap_or_else(|error| panic!("it takes no flush: {error}"));
    let expected = read(&again);
    drop(again);
    let after = open(&folder.after_crash(), size).unwrap_or_else(|error| panic!("after a crash: {error}"));
    assert!(read(&after) == expected, "a flush was not kept");
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let size = 100_001;
    let folder = SimFolder::new(1);
    let made = Overlay::create(Arc::new(folder.clone()), Path::new("o"), identity(size), Arc::new(Hole(size)));
    let overlay = made.unwrap_or_else(|error| panic!("it cannot be made: {error}"));
    let used = (0..3).try_for_each(|round: u64| {
        overlay.write(round * 5000, &[1; 9000])?;
        overlay.trim(round * 12_288, 8192)?;
        overlay.flush()?;
        overlay.write(50_000, &[2; 100])
    });
    used.unwrap_or_else(|error| panic!("it cannot be used: {error}"));
    let read = |name: &str| {
        let Ok(file) = folder.open_read(&Path::new("o").join(name)) else { return Vec::new() };
        let length = file.len().ok().and_then(|length| usize::try_from(length).ok()).unwrap_or(0);
        let mut bytes = vec![0; length.min(16 << 10)];
        file.read_at(0, &mut bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        bytes
    };
    let (journal, recent) = (read("journal"), [read("recent.0"), read("recent.1")]);
    let mut seeds = Vec::new();
    for flags in [0_u8, 1, 3, 15] {
        let mut seed = vec![flags];
        seed.extend(&u32::try_from(size - 1).unwrap_or(0).to_le_bytes()[..3]);
        for recent in &recent {
            seed.extend(u16::try_from(recent.len()).unwrap_or(0).to_le_bytes());
        }
        recent.iter().for_each(|recent| seed.extend(recent));
        seed.extend(&journal);
        seeds.push(seed);
    }
    seeds
}
