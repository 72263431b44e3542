//! [`Layers`]: the runs of an index in layers, in each of which no two overlap, so that a lookup searches one run of
//! each.

use std::sync::Arc;

use super::run::Run;
use crate::id::ChunkId;

/// Runs with their least and greatest ids, by layer.
#[derive(Debug, Default)]
pub(crate) struct Layers(Vec<Vec<(ChunkId, ChunkId, Arc<Run>)>>);

impl Layers {
    /// As few layers as the runs' spans allow. Runs without entries are in none.
    pub fn of(runs: &[Arc<Run>]) -> Layers {
        let mut spans: Vec<(ChunkId, ChunkId, Arc<Run>)> =
            runs.iter().filter_map(|run| run.span().map(|(first, last)| (first, last, run.clone()))).collect();
        spans.sort_unstable_by_key(|(first, last, run)| (*first, *last, run.id));
        let mut layers: Vec<Vec<(ChunkId, ChunkId, Arc<Run>)>> = Vec::new();
        for span in spans {
            // The fullest first: what was merged stays together.
            let fits = |layer: &&mut Vec<_>| layer.last().is_none_or(|(_, last, _)| *last < span.0);
            match layers.iter_mut().filter(fits).max_by_key(|layer| layer.len()) {
                Some(layer) => layer.push(span),
                None => layers.push(vec![span]),
            }
        }
        Layers(layers)
    }

    /// The runs that may hold an id, at most one of each layer.
    pub fn holding(&self, id: &ChunkId) -> impl Iterator<Item = &Arc<Run>> {
        let id = *id;
        self.0.iter().filter_map(move |layer| {
            let after = layer.partition_point(|(first, ..)| *first <= id);
            let (_, last, run) = layer.get(after.checked_sub(1)?)?;
            (id <= *last).then_some(run)
        })
    }

    /// The layers, each with its runs in the order of their ids.
    pub fn each(&self) -> impl Iterator<Item = Vec<Arc<Run>>> {
        self.0.iter().map(|layer| layer.iter().map(|(_, _, run)| run.clone()).collect())
    }
}
