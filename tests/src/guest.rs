//! The test guests: a real Debian kernel on a real disk, and a whole Debian. Built once by `tests/guest/build.sh` and
//! `tests/guest-debian/build.sh`, and kept in the target folder.

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
    /// A real Debian that counts likewise, with systemd and the guest agent: GPT, UEFI. Built by
    /// `tests/guest-debian/build.sh`, for the tests of the night.
    Debian,
}

/// The disk of a guest. It is shared: copy it, or back it up, but never write to it.
pub fn guest(which: Guest) -> PathBuf {
    static BUILT: [OnceLock<()>; 2] = [OnceLock::new(), OnceLock::new()];
    let (built, script) = match which {
        Guest::Oneshot | Guest::Counter | Guest::Uefi => (&BUILT[0], "tests/guest/build.sh"),
        Guest::Debian => (&BUILT[1], "tests/guest-debian/build.sh"),
    };
    let dir = std::env::var_os("LIFEBOAT_GUESTS").map_or_else(|| root().join("target/guests"), PathBuf::from);
    built.get_or_init(|| {
        let built = Command::new("bash").arg(root().join(script)).arg(&dir).output();
        let output = built.unwrap_or_else(|error| panic!("cannot run the guest's build script: {error}"));
        assert!(output.status.success(), "cannot build the guests:\n{}", String::from_utf8_lossy(&output.stderr));
    });
    dir.join(match which {
        Guest::Oneshot => "guest-oneshot.raw",
        Guest::Counter => "guest-counter.raw",
        Guest::Uefi => "guest-uefi.raw",
        Guest::Debian => "guest-debian.raw",
    })
}
