//! A machine that boots a disk without Lifeboat: to compare with, and to see what a restored disk holds.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use crate::{Console, PATIENCE, Sandbox, wait_until};

const UEFI_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const UEFI_VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// What starts the boot loader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firmware {
    /// SeaBIOS, which QEMU has by default.
    Bios,
    /// OVMF.
    Uefi,
}

/// A QEMU machine with one virtio disk, emulated. Dropped, it is killed.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    /// What the guest says.
    pub console: Console,
    qmp: PathBuf,
}

impl Machine {
    /// Boots `drive`, a raw file or an NBD URI. The machine's own files are in the sandbox and begin with `name`.
    #[track_caller]
    pub fn boot(sandbox: &Sandbox, name: &str, drive: &str, firmware: Firmware) -> Machine {
        let console = sandbox.path(&format!("{name}.console"));
        let qmp = sandbox.path(&format!("{name}.qmp"));
        // The console of an earlier boot must not be taken for this one's before QEMU has opened it.
        let _ = std::fs::remove_file(&console);
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "512", "-nodefaults", "-display", "none"]);
        command.args(["-no-reboot", "-drive", &format!("file={},if=virtio,format=raw", drive.replace(',', ",,"))]);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", qmp.display()));
        if firmware == Firmware::Uefi {
            let variables = sandbox.path(&format!("{name}.vars"));
            let copied = std::fs::copy(UEFI_VARIABLES, &variables);
            copied.unwrap_or_else(|error| panic!("{UEFI_VARIABLES}: {error}; run `make deps`"));
            command.arg("-drive").arg(format!("if=pflash,format=raw,readonly=on,file={UEFI_CODE}"));
            command.arg("-drive").arg(format!("if=pflash,format=raw,file={}", variables.display()));
        }
        let child = command.stdin(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|error| panic!("cannot start QEMU: {error}; run `make deps`"));
        Machine { child, console: Console::new(console), qmp }
    }

    /// Presses the power button, on which a counter guest ends by itself.
    #[track_caller]
    pub fn press_power_button(&self) {
        let socket = UnixStream::connect(&self.qmp).expect("QEMU listens on its socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("the timeout is not zero");
        let mut answers = BufReader::new(socket);
        for command in ["qmp_capabilities", "system_powerdown"] {
            let text = format!("{{\"execute\": \"{command}\"}}\n");
            answers.get_mut().write_all(text.as_bytes()).expect("QEMU takes commands");
            // A greeting and events may come before the answer, which alone begins like this.
            let mut line = String::new();
            while !line.starts_with("{\"return\"") {
                line.clear();
                let read = answers.read_line(&mut line).expect("QEMU answers");
                assert!(read > 0 && !line.starts_with("{\"error\""), "{command}: {line}");
            }
        }
    }

    /// Waits until the guest has powered itself off.
    #[track_caller]
    pub fn wait_for_power_off(&mut self) -> ExitStatus {
        self.console.wait_for("LIFEBOAT-GUEST: down");
        let mut status = None;
        wait_until("QEMU ends", || {
            status = self.child.try_wait().unwrap_or_else(|error| panic!("cannot wait for QEMU: {error}"));
            status.is_some()
        });
        let status = status.unwrap_or_else(|| unreachable!("waited for it"));
        assert!(status.success(), "QEMU: {status}");
        status
    }

    /// Ends the machine at once, as a power cut does.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

/// Boots production storage alone: nothing that the guest said is durable is missing.
#[track_caller]
pub fn holds_all(sandbox: &Sandbox, target: &str, promised: u64) {
    let mut machine = Machine::boot(sandbox, "after", target, Firmware::Bios);
    let kept = machine.console.next_number("log ok last=");
    assert!(kept >= promised, "the guest had synced record {promised}, production storage holds {kept}");
    machine.console.wait_for("slots ok");
    machine.kill();
}
