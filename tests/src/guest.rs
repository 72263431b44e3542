//! The test guest: a real Debian kernel on a real disk, built once by `tests/guest/build.sh` and kept in the target
//! folder.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use crate::root;

/// Which guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// Checks its files, makes a record durable, powers off. BIOS.
    Oneshot,
    /// The same, and then counts durably until its power button is pressed. BIOS.
    Counter,
    /// Like [`Guest::Oneshot`], on a GPT disk that boots with UEFI.
    Uefi,
}

/// The disk of a guest. It is shared: copy it, or back it up, but never write to it.
pub fn guest(which: Guest) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    let dir = std::env::var_os("LIFEBOAT_GUESTS").map_or_else(|| root().join("target/guests"), PathBuf::from);
    BUILT.get_or_init(|| {
        let built = Command::new("bash").arg(root().join("tests/guest/build.sh")).arg(&dir).output();
        let output = built.unwrap_or_else(|error| panic!("cannot run the guest's build script: {error}"));
        assert!(output.status.success(), "cannot build the guests:\n{}", String::from_utf8_lossy(&output.stderr));
    });
    dir.join(match which {
        Guest::Oneshot => "guest-oneshot.raw",
        Guest::Counter => "guest-counter.raw",
        Guest::Uefi => "guest-uefi.raw",
    })
}
