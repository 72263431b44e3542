//! Whom damage hits: a second walk, only where there is damage, that finds every place at which a point has what cannot
//! be read.

use super::{Affected, Bad, Verifier, VerifyError};
use crate::id::{ChunkId, PackId, RecoveryPointId};
use crate::index::seen::Seen;
use crate::manifest::{FAN_OUT, Shape};
use crate::point::{PointedDisk, RecoveryPoint};
use crate::storage::Object;

impl Verifier<'_> {
    /// Notes the objects to blame for what is bad, with the disks and offsets that it hits.
    pub(super) fn attribute(&mut self) -> Result<(), VerifyError> {
        if self.bad.is_empty() {
            return Ok(());
        }
        let clean = Seen::new(&self.repository.fetcher().index);
        let (points, bad) = (std::mem::take(&mut self.points), std::mem::take(&mut self.bad));
        let mut outcome = Ok(());
        'points: for point in &points {
            for disk in &point.disks {
                let Some(shape) = Shape::of(disk.size, disk.chunk_size) else { continue }; // refused when loaded
                let mut place = Place { verifier: self, bad: &bad, clean: &clean, point, disk };
                if let Err(error) = place.node(disk.root, shape.levels - 1, 0) {
                    outcome = Err(error);
                    break 'points;
                }
            }
        }
        (self.points, self.bad) = (points, bad);
        outcome
    }

    /// What is wrong, and with which object.
    fn blame(&self, id: &ChunkId, packs: &[PackId], point: RecoveryPointId) -> Vec<(Object, String)> {
        if packs.is_empty() {
            return vec![(Object::Point(point), format!("its chunk or node {id} is in no pack"))];
        }
        let what = |pack| self.wrong.get(pack).cloned().unwrap_or_else(|| "it is damaged".to_owned());
        packs.iter().map(|pack| (Object::Pack(*pack), what(pack))).collect()
    }
}

struct Place<'v, 'a> {
    verifier: &'v mut Verifier<'a>,
    bad: &'v Bad,
    /// Nodes below which nothing is bad.
    clean: &'v Seen,
    point: &'v RecoveryPoint,
    disk: &'v PointedDisk,
}

impl Place<'_, '_> {
    /// Whether something at or below a node, which begins at a chunk, is bad. At most 7 levels deep.
    fn node(&mut self, id: ChunkId, level: u8, first: u64) -> Result<bool, VerifyError> {
        if id.is_zero() || self.clean.contains(&id) {
            return Ok(false);
        }
        self.verifier.stop_if_cancelled()?;
        if let Some(blame) = self.bad.get(&id) {
            self.hit(&id, &blame.packs, first, Shape::span(level));
            return Ok(true);
        }
        // Whatever fails now and did not before is found by the next verification.
        let Ok(node) = self.verifier.repository.fetcher().node(&id, level) else { return Ok(true) };
        let step = Shape::span(level) / FAN_OUT;
        let mut any = false;
        for at in 0..FAN_OUT {
            let (child, chunk) = (node.child(at), first + at * step);
            if level > 0 {
                any |= self.node(child, level - 1, chunk)?;
            } else if let Some(blame) = self.bad.get(&child) {
                self.hit(&child, &blame.packs, chunk, 1);
                any = true;
            }
        }
        if !any {
            self.clean.insert(&id);
        }
        Ok(any)
    }

    fn hit(&mut self, id: &ChunkId, packs: &[PackId], chunk: u64, chunks: u64) {
        let size = u64::from(self.disk.chunk_size);
        let start = chunk.saturating_mul(size).min(self.disk.size);
        let end = chunk.saturating_add(chunks).saturating_mul(size).min(self.disk.size);
        for (object, what) in self.verifier.blame(id, packs, self.point.id) {
            let (point, machine, disk) = (self.point.id, self.point.machine.clone(), self.disk.name.clone());
            self.verifier.note(object, what);
            let Some(finding) = self.verifier.findings.get_mut(&object) else { continue };
            let affected = Affected { point, machine, disk: disk.clone(), ranges: Vec::new() };
            let affected = finding.affected.entry((point, disk)).or_insert(affected);
            match affected.ranges.last_mut() {
                // A pack may be to blame in several places.
                Some(last) if (last.start..=last.end).contains(&start) => last.end = last.end.max(end),
                _ => affected.ranges.push(start..end),
            }
        }
    }
}
