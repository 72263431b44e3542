//! The fuzzer: runs the target that `LIFEBOAT_FUZZ_TARGET` names, and writes its seeds to `LIFEBOAT_FUZZ_SEEDS` before.
#![no_main]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use lifeboat_fuzz::{TARGETS, Target};

static CHOSEN: OnceLock<&'static Target> = OnceLock::new();

libfuzzer_sys::fuzz_target!(init: prepare(), |data: &[u8]| {
    if let Some(target) = CHOSEN.get() {
        (target.run)(data);
    }
});

fn prepare() {
    let name = std::env::var("LIFEBOAT_FUZZ_TARGET").unwrap_or_default();
    let target = TARGETS.iter().find(|target| target.name == name);
    let target = target.unwrap_or_else(|| {
        let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
        panic!("LIFEBOAT_FUZZ_TARGET has to be one of {names:?}, not {name:?}")
    });
    if let Some(dir) = std::env::var_os("LIFEBOAT_FUZZ_SEEDS") {
        write_seeds(target, &PathBuf::from(dir));
    }
    // The images crate fences its library's panics off; all others end the process.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let fenced = panic.location().is_some_and(|place| place.file().contains("/imago-"));
        if !fenced {
            report(panic);
            std::process::abort();
        }
    }));
    let _ = CHOSEN.set(target);
}

fn write_seeds(target: &Target, dir: &Path) {
    std::fs::create_dir_all(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    for (number, seed) in (target.seeds)().iter().enumerate() {
        let path = dir.join(format!("seed-{number}"));
        std::fs::write(&path, seed).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}
