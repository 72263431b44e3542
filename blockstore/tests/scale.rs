//! An index of a million entries: what it costs in memory, and that it is the same when it is built anew.

#[path = "../examples/synthetic/mod.rs"]
mod synthetic;

use std::sync::Arc;

use blockstore::{ChunkId, LocalStorage, Protection, Repository, Storage};
use synthetic::{Shape, memory, mix, write_index, write_packs};

fn absent(number: u64) -> ChunkId {
    ChunkId(*blake3::hash(&number.to_le_bytes()).as_bytes())
}

fn check(repository: &Repository, shape: Shape) {
    assert_eq!(repository.stats().expect("counts").index_entries, shape.chunks);
    for number in 0..100_000 {
        assert!(repository.knows(&shape.id(mix(number) % shape.chunks)), "chunk {number}");
        assert!(!repository.knows(&absent(number)), "absent chunk {number}");
    }
}

/// One test, so that nothing else moves this process's memory.
#[test]
fn an_index_is_searched_in_place_and_built_anew_from_packs() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let shape = Shape::of(96 << 30, 64 << 10); // 1.5 million chunks
    let storage: Arc<dyn Storage> = Arc::new(LocalStorage::at(dir.path()));
    let id = Repository::init(storage.clone(), 64 << 10, Protection::None).expect("made").id();
    write_index(dir.path(), id, shape).expect("written");
    let open = || Repository::open(storage.clone(), None, 0).expect("opens");
    let (before, _) = memory();
    let repository = open();
    check(&repository, shape);
    let own = memory().0.saturating_sub(before);
    assert!(own < 16 << 20, "{own} bytes of memory for an index of {} entries", shape.chunks);
    drop(repository);

    std::fs::remove_dir_all(dir.path().join("index")).expect("removed");
    write_packs(dir.path(), id, shape).expect("written");
    // A lookup that leads nowhere has the packs read.
    let storage: Arc<dyn Storage> = Arc::new(LocalStorage::at(dir.path()));
    let repository = Repository::open(storage.clone(), None, 0).expect("opens");
    repository.rebuild_index().expect("rebuilt");
    check(&repository, shape);
    let peak = memory().0.saturating_sub(before);
    assert!(peak < 256 << 20, "{peak} bytes of memory to rebuild {} entries", shape.chunks);
    check(&Repository::open(storage, None, 0).expect("opens"), shape);
}
