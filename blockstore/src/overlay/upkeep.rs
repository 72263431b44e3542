//! Upkeep beside the flushes: a shorter journal, and a look at the space that is left. The order of the durable writes
//! is that of docs/format/overlay.md, "Compaction".

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::Overlay;
use super::error::OverlayError;
use super::format::GRAIN;
use super::journal::{self, Journal, Next};

/// Little space is less than this share of the file system, or less than this many bytes where that is more.
const SHORT_SHARE: u64 = 10;
const SHORT_MIN: u64 = 2 << 30;
/// Hardly any: the guest may be stopped soon.
const CRITICAL: u64 = 256 << 20;

/// How much room an overlay has left to grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Room {
    /// Enough.
    Enough,
    /// So little that somebody should see to it.
    Short,
    /// The guest may be stopped soon.
    Critical,
}

/// The space an overlay stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes the file system has left.
    pub free: u64,
    /// Bytes the guest can still make the overlay take: what of the disk it has not overwritten.
    pub wanted: u64,
    /// What to think of it.
    pub room: Room,
}

impl Space {
    fn judge(free: u64, total: u64, wanted: u64) -> Space {
        let room = if free >= wanted {
            Room::Enough
        } else if free < CRITICAL {
            Room::Critical
        } else if free < (total / SHORT_SHARE).max(SHORT_MIN) {
            Room::Short
        } else {
            Room::Enough
        };
        Space { free, wanted, room }
    }
}

impl Overlay {
    /// What no flush should wait for: compacts the journal if it is long, and warns in the log, once each time, when
    /// space gets short. For a thread that may block, every few seconds; without it flushes compact by themselves, later.
    pub fn maintain(&self) -> Result<(), OverlayError> {
        self.watch_space();
        let Some(next) = self.begin_compaction() else { return Ok(()) };
        let written = next.write(&self.place, &self.map);
        self.finish_compaction(written)
    }

    /// The space it stands on, where the folder can tell.
    pub fn space(&self) -> Option<Space> {
        let (free, total) = self.place.folder.space(&self.place.dir).ok()??;
        let held = self.map.data_grains().saturating_mul(GRAIN);
        Some(Space::judge(free, total, self.size.saturating_sub(held)))
    }

    fn watch_space(&self) {
        let Some(space) = self.space() else { return };
        let level = match space.room {
            Room::Enough => 0,
            Room::Short => 1,
            Room::Critical => 2,
        };
        let before = self.room.swap(level, Ordering::Relaxed);
        let (overlay, free, wanted) = (self.place.shown(""), space.free, space.wanted);
        match space.room {
            Room::Enough if before > 0 => {
                tracing::info!(overlay = %overlay.display(), free, "the overlay has room again");
            }
            Room::Short if before < 1 => {
                tracing::warn!(overlay = %overlay.display(), free, wanted,
                    "the overlay's file system gets full: make room, or commit, rehydrate or discard something");
            }
            Room::Critical if before < 2 => {
                tracing::error!(overlay = %overlay.display(), free, wanted,
                    "the overlay's file system is nearly full: the guest will be stopped when it is, until there is room");
            }
            _ => {}
        }
    }

    /// Step 1 of a compaction beside the flushes.
    pub(super) fn begin_compaction(&self) -> Option<Next> {
        if self.is_poisoned() {
            return None;
        }
        self.journal.lock().unwrap_or_else(PoisonError::into_inner).begin_next()
    }

    /// Steps 3 to 7: flushes wait meanwhile, for a time that does not depend on how long the journal is.
    pub(super) fn finish_compaction(&self, written: Result<Journal, OverlayError>) -> Result<(), OverlayError> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let carried = journal.end_next();
        self.check_poison()?;
        let new = written.and_then(|mut new| {
            match &carried {
                Some(records) if !records.is_empty() => new.append(records)?,
                _ => {}
            }
            Ok(new)
        });
        let mut new = match (new, carried) {
            (Ok(new), Some(_)) => new,
            (new, _) => {
                self.give_up(new.err());
                journal.postpone_compaction();
                return Ok(());
            }
        };
        let installed = self.install(&mut journal, &mut new);
        match installed.map_err(|error| self.judge(error))? {
            true => *journal = new,
            false => journal.postpone_compaction(),
        }
        self.journal_bytes.store(journal.bytes(), Ordering::Relaxed);
        Ok(())
    }

    /// Compacts within a flush; false if the new journal could not be written, and nothing changed.
    pub(super) fn compact(&self, journal: &mut Journal) -> Result<bool, OverlayError> {
        match journal.write_next(&self.place, &self.map) {
            Ok(mut new) => {
                let installed = self.install(journal, &mut new)?;
                if installed {
                    *journal = new;
                }
                Ok(installed)
            }
            Err(error) => {
                self.give_up(Some(error));
                Ok(false)
            }
        }
    }

    /// Makes durable what the new journal names, then itself, and gives it the old one's name; false if the new one
    /// could not be made durable, and nothing changed.
    fn install(&self, old: &mut Journal, new: &mut Journal) -> Result<bool, OverlayError> {
        self.sync_data()?;
        if let Err(error) = new.sync() {
            self.give_up(Some(error));
            return Ok(false);
        }
        new.install(&self.place)?;
        let (before, after) = (old.bytes(), new.bytes());
        tracing::debug!(overlay = %self.place.shown("").display(), before, after, "compacted the journal");
        Ok(true)
    }

    /// Leaves a new journal that could not be written, or not in time; the old one is as it was.
    fn give_up(&self, error: Option<OverlayError>) {
        let overlay = self.place.shown("");
        match error {
            Some(error) => tracing::warn!(overlay = %overlay.display(), %error, "cannot compact the journal now"),
            None => {
                tracing::debug!(overlay = %overlay.display(), "too much was flushed while the journal was compacted")
            }
        }
        // Where even that fails, the next compaction or opener removes it.
        let _ = self.place.folder.remove(&self.place.file(journal::NEW_NAME));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_short_only_if_the_guest_could_use_it_up() {
        let room = |free, total, wanted| Space::judge(free, total, wanted).room;
        assert_eq!(room(1 << 20, 1 << 40, 1 << 20), Room::Enough);
        assert_eq!(room(1 << 20, 1 << 40, 2 << 20), Room::Critical);
        assert_eq!(room(1 << 30, 8 << 30, 100 << 30), Room::Short);
        assert_eq!(room(50 << 30, 1 << 40, 100 << 30), Room::Short);
        assert_eq!(room(200 << 30, 1 << 40, 300 << 30), Room::Enough);
    }
}
