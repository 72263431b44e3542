//! The guests themselves, on raw disks: what they promise on the console must hold before anything else is judged by it.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use lifeboat_tests::{Firmware, Guest, Machine, Sandbox, copy_sparse, guest, have};

/// A copy of a guest's disk, for this test alone.
fn disk(sandbox: &Sandbox, which: Guest) -> String {
    copy_sparse(&guest(which), &sandbox.path("disk.raw"));
    sandbox.name("disk.raw")
}

/// Follows a guest to its own end and checks everything that it says on the way.
fn boot_and_power_off(sandbox: &Sandbox, disk: &str, firmware: Firmware, boot_number: u64) {
    let mut machine = Machine::boot(sandbox, "vm", disk, firmware);
    assert_eq!(machine.console.next_number("up boot="), boot_number);
    assert_eq!(machine.console.next_number("records ok "), boot_number - 1);
    assert!(machine.console.next_number("files ok ") >= 200);
    assert_eq!(machine.console.next_number("record "), boot_number);
    machine.wait_for_power_off();
}

#[test]
fn a_oneshot_guest_remembers_its_boots() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let sandbox = Sandbox::new();
    let disk = disk(&sandbox, Guest::Oneshot);
    for boot_number in 1..=2 {
        boot_and_power_off(&sandbox, &disk, Firmware::Bios, boot_number);
    }
}

#[test]
fn a_uefi_guest_boots_from_its_system_partition() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let sandbox = Sandbox::new();
    let disk = disk(&sandbox, Guest::Uefi);
    boot_and_power_off(&sandbox, &disk, Firmware::Uefi, 1);
}

#[test]
fn a_counter_guest_keeps_what_it_said_through_a_power_cut() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let sandbox = Sandbox::new();
    let disk = disk(&sandbox, Guest::Counter);

    let mut machine = Machine::boot(&sandbox, "vm", &disk, Firmware::Bios);
    assert_eq!(machine.console.next_number("log ok last="), 0);
    machine.console.wait_for("seq 5");
    let promised = machine.console.last_number("seq ").expect("it counts");
    machine.kill();

    let mut machine = Machine::boot(&sandbox, "vm", &disk, Firmware::Bios);
    let kept = machine.console.next_number("log ok last=");
    assert!(kept >= promised, "said {promised}, kept {kept}");
    assert_eq!(machine.console.next_number("slots ok "), 1024);
    assert_eq!(machine.console.next_number("seq "), kept + 1);
    machine.press_power_button();
    machine.wait_for_power_off();
}

/// A guest that called every disk good would make every test pass.
#[test]
fn a_damaged_disk_is_called_damaged() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let sandbox = Sandbox::new();
    let disk = disk(&sandbox, Guest::Counter);
    change_a_slot(&disk);
    let mut machine = Machine::boot(&sandbox, "vm", &disk, Firmware::Bios);
    let line = machine.console.wait_for("slots");
    assert!(line.contains("slots DAMAGED slot 7: should be of step 0"), "{line}");
    machine.kill();
}

/// Changes one byte of the slot file's eighth slot, found by its contents: step 0, and what the guest's generator gives
/// for slot 7.
fn change_a_slot(disk: &str) {
    let bytes = fs::read(disk).expect("the disk can be read");
    let mut state = 7_u64.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    let mut beginning = [0; 16];
    beginning[8..].copy_from_slice(&state.to_le_bytes());
    let block = bytes.chunks(4096).position(|block| block.starts_with(&beginning)).expect("the slot is on the disk");
    let at = block as u64 * 4096 + 2000;
    let changed = bytes.get(block * 4096 + 2000).expect("inside the disk") ^ 0x10;
    let file = OpenOptions::new().write(true).open(disk).expect("the disk can be written");
    file.write_all_at(&[changed], at).expect("the disk can be written");
}
