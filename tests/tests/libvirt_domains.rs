//! Domains of other kinds than the plain one of the host: of a user, with UEFI, with the original's identity; and domains
//! whose guest has an agent, or whose recovery cannot be read any more.

use std::fs;

use lifeboat_tests::{Guest, Libvirtd, Sandbox, guest, have, noise, wait_until};

const MIB: usize = 1 << 20;

/// A plain repository with one point of `vm`, this guest, and a daemon.
fn prepared(which: Guest) -> Option<(Sandbox, Libvirtd)> {
    if !have(&["qemu-system-x86_64"]) {
        return None;
    }
    let sandbox = Sandbox::with_plain_repository("64K");
    let daemon = Libvirtd::start(&sandbox)?;
    sandbox.ok(&["backup", "vm", &guest(which).display().to_string()]);
    Some((sandbox, daemon))
}

#[test]
fn a_users_own_libvirt_runs_a_domain_and_moves_it_to_production() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let Some(sandbox) = Sandbox::of_a_user("64K") else { return };
    let Some(daemon) = Libvirtd::start(&sandbox) else { return };
    assert!(daemon.uri().contains(":///session"), "{}", daemon.uri());
    let disk = noise(3, 4 * MIB);
    fs::write(sandbox.path("disk.raw"), &disk).unwrap();
    sandbox.ok(&["backup", "vm", &sandbox.name("disk.raw")]);
    daemon.recover(&sandbox, &["--persistent"]);
    assert_eq!(daemon.virsh(&["domstate", "vm"]).trim(), "running");
    let target = sandbox.name("production.raw");
    sandbox.ok(&["rehydrate", "vm", "--to", &target]);
    assert_eq!(sandbox.json(&["recovery", "vm"])["rehydration"]["mode"], "mirror");
    sandbox.ok(&["cutover", "vm"]);
    let kept = daemon.virsh(&["dumpxml", "--inactive", "vm"]);
    assert!(kept.contains(&target) && !kept.contains("nbd"), "{kept}");
    daemon.virsh(&["destroy", "vm"]);
    assert!(fs::read(&target).unwrap() == disk);
    sandbox.ok(&["discard", "vm"]);
    daemon.virsh(&["undefine", "vm"]);
}

#[test]
fn a_domain_with_uefi_boots_with_its_own_variables_and_takes_them_with_it() {
    let Some((sandbox, daemon)) = prepared(Guest::Uefi) else { return };
    let (_, mut console) = daemon.recover(&sandbox, &[]);
    let made = daemon.virsh(&["dumpxml", "vm"]);
    assert!(made.contains("OVMF") && made.contains("recoveries/vm/uefi-vars.fd"), "{made}");
    console.wait_for("files ok");
    sandbox.ok(&["discard", "vm"]);
    assert!(!daemon.knows("vm"));
    // What libvirt keeps of a persistent one lies where libvirt likes, and goes with the domain.
    daemon.recover(&sandbox, &["--persistent"]);
    let variables = sandbox.path("virt/lib/qemu/nvram/vm_VARS.fd");
    let made = daemon.virsh(&["dumpxml", "vm"]);
    assert!(made.contains("/nvram/vm_VARS.fd"), "{made}");
    assert!(variables.exists() || daemon.uri().contains("session"), "no {}", variables.display());
    sandbox.ok(&["discard", "vm"]);
    assert!(!daemon.knows("vm") && !variables.exists());
}

#[test]
fn an_identity_is_kept_once_the_original_is_gone() {
    let Some((sandbox, daemon)) = prepared(Guest::Counter) else { return };
    let on = format!("libvirt:{}", daemon.uri());
    let disk = sandbox.name("web.raw");
    fs::write(&disk, noise(1, MIB)).unwrap();
    let (uuid, mac) = ("7b0f2b2e-3c55-4c5e-9d2b-0a4c7d0e6f11", "52:54:00:77:66:55");
    let xml = format!(
        "<domain type='qemu'><name>web</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features><cpu mode='maximum'/>\
         <devices><disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/>\
         <target dev='vda' bus='virtio'/></disk>\
         <interface type='user'><mac address='{mac}'/><model type='virtio'/></interface></devices></domain>"
    );
    let file = sandbox.path("web.xml");
    fs::write(&file, xml).unwrap();
    daemon.virsh(&["define", file.to_str().unwrap()]);
    sandbox.ok(&["backup", &format!("{on}#web")]);
    let keep = ["recover", "web", "--name", "back", "--on", &on, "--keep-identity", "--network", "user", "--wait", "0"];
    let refused = sandbox.fails(1, &keep);
    assert!(refused.contains(uuid) && refused.contains("not of this recovery"), "{refused}");
    assert!(!daemon.knows("back") && daemon.knows("web"));
    daemon.virsh(&["undefine", "web"]);
    let view = sandbox.json(&keep);
    assert_eq!(view["domain"]["uuid"], uuid, "{view}");
    let made = daemon.virsh(&["dumpxml", "back"]);
    assert!(made.contains(mac) && made.contains(uuid), "{made}");
    sandbox.ok(&["discard", "back"]);
    assert!(!daemon.knows("back"));
}

#[test]
fn a_guest_with_an_agent_is_frozen_through_libvirt_for_the_instant_of_a_commit() {
    let Some((sandbox, mut daemon)) = prepared(Guest::Counter) else { return };
    let (_, mut console) = daemon.recover(&sandbox, &[]);
    console.count_on(3);
    wait_until("the agent answers", || sandbox.json(&["commit", "vm"])["consistency"] == "application");
    let result = sandbox.json(&["commit", "vm", "--consistency", "application"]);
    assert_eq!(sandbox.json(&["show", result["point"].as_str().unwrap()])["consistency"], "application");
    let mark = sandbox.path("state/recoveries/vm/guest-is-quiet");
    assert!(!mark.exists());
    console.count_on(3);
    // Killed between the freeze and the thaw: what Lifeboat finds when it is back is this.
    daemon.virsh(&["domfsfreeze", "vm"]);
    fs::write(&mark, "").unwrap();
    sandbox.kill_owner();
    assert_eq!(sandbox.json(&["recovery", "vm"])["state"], "running");
    wait_until("the guest is thawed", || !mark.exists());
    console.count_on(3);
    // Nobody can ask the agent: `auto` does without, and says why.
    daemon.kill();
    let auto = sandbox.json(&["commit", "vm"]);
    assert_eq!(auto["consistency"], "crash", "{auto}");
    assert!(auto["why_crash"].as_str().unwrap().contains("libvirt"), "{auto}");
    let refused = sandbox.fails(5, &["commit", "vm", "--consistency", "application"]);
    assert!(refused.contains("libvirt"), "{refused}");
    assert!(!mark.exists());
    console.count_on(3);
    daemon.start_again();
    sandbox.ok(&["discard", "vm"]);
}

#[test]
fn the_domain_of_a_recovery_whose_journal_is_damaged_ends_with_it() {
    let Some((sandbox, mut daemon)) = prepared(Guest::Counter) else { return };
    // Its first record is damaged, then all: another recovery still knows where domains are.
    for (name, damaged) in [("one", 20..21), ("two", 0..100_000)] {
        daemon.recover(&sandbox, &["--name", name, "--persistent"]);
        let other = (name == "two").then(|| daemon.recover(&sandbox, &["--name", "other"]));
        sandbox.kill_owner();
        let journal = sandbox.path(&format!("state/recoveries/{name}/journal"));
        let mut bytes = fs::read(&journal).unwrap();
        let lines_stay = |byte: u8| !matches!(byte, b'\n' | 0x0b);
        for (at, byte) in bytes.iter_mut().enumerate() {
            if damaged.contains(&at) && lines_stay(*byte) {
                *byte ^= 1;
            }
        }
        fs::write(&journal, bytes).unwrap();
        let listed = sandbox.json(&["recovery", name]);
        assert!(listed["state"] == "failed" && daemon.knows(name), "{listed}");
        if other.is_none() {
            daemon.kill();
            let refused = sandbox.fails(1, &["discard", name]);
            assert!(refused.contains("cannot connect to libvirt") && refused.contains("again"), "{refused}");
            daemon.start_again();
        }
        sandbox.ok(&["discard", name]);
        assert!(!daemon.knows(name) && !sandbox.path(&format!("state/recoveries/{name}")).exists());
    }
    assert!(daemon.knows("other"));
    sandbox.ok(&["discard", "other"]);
}
