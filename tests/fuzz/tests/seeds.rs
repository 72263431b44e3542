//! Every target takes its seeds, and everything that was ever found.

use std::path::Path;

use lifeboat_fuzz::TARGETS;

#[test]
fn every_target_takes_its_seeds_cut_off_anywhere() {
    for target in TARGETS {
        let seeds = (target.seeds)();
        assert!(!seeds.is_empty(), "{} has no seeds", target.name);
        for seed in seeds {
            println!("{}: a seed of {} bytes", target.name, seed.len());
            (target.run)(&seed);
            for cut in (0..seed.len()).step_by(1 + seed.len() / 20) {
                (target.run)(&seed[..cut]);
            }
        }
    }
}

/// `tests/fuzz/corpus/TARGET/NAME`: inputs that once broke something, and good ones of formats as they were released.
#[test]
fn every_input_that_was_kept_is_taken() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for dir in std::fs::read_dir(&corpus).expect("the corpus is there") {
        let dir = dir.expect("the corpus can be listed").path();
        let name = dir.file_name().expect("it has a name").to_string_lossy().into_owned();
        let target = TARGETS.iter().find(|target| target.name == name);
        let target = target.unwrap_or_else(|| panic!("{} is the corpus of no target", dir.display()));
        for input in std::fs::read_dir(&dir).expect("a folder") {
            let path = input.expect("the corpus can be listed").path();
            println!("{}", path.display());
            (target.run)(&std::fs::read(&path).expect("readable"));
        }
    }
}
