//! Taking packs out of the index.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use tracing::{debug, warn};

use super::build::RunBuilder;
use super::run::{Run, put_run};
use super::{Index, insert};
use crate::id::{ChunkId, PackId};
use crate::storage::Object;

impl Index {
    /// Replaces every run that names one of these packs by runs that do not.
    ///
    /// Order, for each run: (1) what is left of it is durable, (2) it is deleted. Swapped, a crash in between would lose
    /// entries. A damaged run is left as it is: it is rebuilt from the packs when that is found out.
    pub fn without(&self, gone: &HashSet<PackId>) -> io::Result<()> {
        for run in self.runs() {
            if !run.packs().any(|row| gone.contains(&row.pack)) {
                continue;
            }
            if !run.is_intact() {
                warn!(object = %Object::IndexRun(run.id), "left as it is: it is damaged");
                continue;
            }
            let kept = self.put_without(&run, gone)?;
            let stays = kept.iter().any(|new| new.id == run.id);
            self.change(|runs| {
                runs.retain(|known| known.id != run.id);
                kept.into_iter().for_each(|new| insert(runs, new));
            });
            if !stays {
                self.storage.delete(&Object::IndexRun(run.id))?;
            }
            debug!(run = %run.id, "index run rewritten");
        }
        Ok(())
    }

    fn put_without(&self, run: &Run, gone: &HashSet<PackId>) -> io::Result<Vec<Arc<Run>>> {
        let mut kept = Vec::new();
        let mut entries = RunBuilder::default();
        let mut last: Option<ChunkId> = None;
        for location in run.entries().iter().filter_map(|raw| run.location(raw)) {
            if gone.contains(&location.pack.pack) {
                continue;
            }
            // Cut only between ids, as a merge does.
            if entries.is_full() && last != Some(location.entry.id) {
                let full = self.build(std::mem::take(&mut entries))?;
                kept.push(Arc::new(put_run(&*self.storage, full, self.repository)?));
            }
            last = Some(location.entry.id);
            entries.add(location.pack, location.entry);
        }
        if entries.len() > 0 {
            let rest = self.build(entries)?;
            kept.push(Arc::new(put_run(&*self.storage, rest, self.repository)?));
        }
        Ok(kept)
    }
}
