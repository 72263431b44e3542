//! Against the QEMU of this host, where there is one.

use super::*;

/// Whether the test can run. In CI a missing program is a failure.
fn installed() -> bool {
    let found = std::process::Command::new(super::super::DEFAULT_BINARY).arg("--version").output().is_ok();
    assert!(found || std::env::var_os("CI").is_none(), "qemu-system-x86_64 is missing");
    if !found {
        println!("skipped: qemu-system-x86_64 is not installed");
    }
    found
}

#[tokio::test]
async fn the_installed_qemu_says_what_it_is() {
    if !installed() {
        return;
    }
    let capabilities = probe(Path::new(super::super::DEFAULT_BINARY)).await.expect("it answers");
    assert!(capabilities.version >= Version { major: 7, minor: 2, micro: 0 }, "{}", capabilities.version);
    for machine in ["q35", "pc"] {
        assert!(capabilities.machine_types.iter().any(|known| known == machine), "{machine}");
    }
}

#[tokio::test]
async fn a_program_that_is_not_there_names_its_package() {
    let error = probe(Path::new("/nonexistent/qemu")).await.expect_err("not installed");
    assert!(matches!(error, ProbeError::MissingBinary { .. }), "{error}");
    assert!(error.to_string().contains("qemu-system-x86"), "{error}");
}

#[tokio::test]
async fn a_program_that_is_not_qemu_is_refused() {
    let error = probe(Path::new("/bin/echo")).await.expect_err("not QEMU");
    assert!(matches!(error, ProbeError::NoQmp { .. }), "{error}");
}

#[tokio::test]
async fn a_working_accelerator_passes_the_trial_and_a_missing_one_says_why() {
    if !installed() {
        return;
    }
    let binary = Path::new(super::super::DEFAULT_BINARY);
    // The emulator stands in for an accelerator that works; it needs longer than KVM.
    trial(binary, "tcg", "max", Duration::from_secs(60)).await.expect("the BIOS boots");
    let why = trial(binary, "no-such-accelerator", "max", KVM_TRIAL).await.expect_err("unknown");
    assert!(why.contains("no-such-accelerator"), "{why}");
    let why = trial(binary, "tcg", "max", Duration::from_millis(1)).await.expect_err("too little time");
    assert!(why.contains("no progress"), "{why}");
}

#[tokio::test]
async fn auto_decides_within_its_limit_and_once() {
    if !installed() {
        return;
    }
    let binary = Path::new(super::super::DEFAULT_BINARY);
    let first = accelerator(binary, Accelerator::Auto).await;
    assert!(!first.reason.is_empty());
    let began = std::time::Instant::now();
    assert_eq!(accelerator(binary, Accelerator::Auto).await, first);
    assert!(began.elapsed() < Duration::from_millis(100), "the second answer comes from memory");
    assert!(!accelerator(binary, Accelerator::Tcg).await.kvm);
    assert!(accelerator(binary, Accelerator::Kvm).await.kvm);
}

#[tokio::test]
async fn a_text_is_found_across_reads() {
    let (mut writer, reader) = tokio::io::duplex(64);
    let writing = tokio::spawn(async move {
        for part in ["No boot", "able dev", "ice."] {
            tokio::io::AsyncWriteExt::write_all(&mut writer, part.as_bytes()).await.expect("the reader reads");
            tokio::task::yield_now().await;
        }
    });
    assert!(wait_for(reader, BIOS_DONE).await);
    writing.await.expect("the writer does not panic");
    assert!(!wait_for(&b"No bootable"[..], BIOS_DONE).await);
}
