//! Recoveries on a real libvirt daemon, which the test starts itself: defined and started, kept through crashes of
//! Lifeboat and of the daemon, moved to production storage both ways, and undone when something fails.

use std::fs;

use lifeboat_tests::{Console, Guest, Libvirtd, Sandbox, guest, have, holds_all, wait_for_domain, wait_until};

/// A repository with one point of `vm`, the counter guest, and a daemon.
fn prepared() -> Option<(Sandbox, Libvirtd)> {
    if !have(&["qemu-system-x86_64"]) {
        return None;
    }
    let sandbox = Sandbox::with_plain_repository("64K");
    let daemon = Libvirtd::start(&sandbox)?;
    sandbox.ok(&["backup", "vm", &guest(Guest::Counter).display().to_string()]);
    Some((sandbox, daemon))
}

#[test]
fn a_recovered_domain_outlives_lifeboat_and_libvirtd_and_moves_to_production_by_stream() {
    let Some((sandbox, mut daemon)) = prepared() else { return };
    let (view, mut console) = daemon.recover(&sandbox, &["--persistent"]);
    assert_eq!(view["hypervisor"], format!("libvirt:{}", daemon.uri()));
    assert_eq!((&view["domain"]["name"], &view["domain"]["keep"]), (&"vm".into(), &"persistent".into()));
    assert_eq!(daemon.virsh(&["domuuid", "vm"]).trim(), view["domain"]["uuid"].as_str().unwrap());
    assert!(view["pid"].is_u64() && view["qmp"].is_null(), "{view}");
    console.count_on(5);

    // Lifeboat dies, then the daemon, then both; Lifeboat is back first, and waits for the daemon.
    sandbox.kill_owner();
    let after = sandbox.json(&["recovery", "vm"]);
    assert_eq!((&after["state"], &after["pid"]), (&view["state"], &view["pid"]));
    console.count_on(5);
    daemon.kill();
    console.count_on(3);
    sandbox.kill_owner();
    assert_eq!(sandbox.json(&["recovery", "vm"])["vm"], "unreachable");
    daemon.start_again();
    wait_until("the domain is seen to run again", || sandbox.json(&["recovery", "vm"])["vm"] == "running");
    console.count_on(5);

    // To production storage, while it counts; in the middle Lifeboat dies once more.
    let target = sandbox.name("production.raw");
    sandbox.ok(&["rehydrate", "vm", "--mode", "stream", "--to", &target, "--limit", "24M", "--detach"]);
    console.count_on(2);
    sandbox.kill_owner();
    wait_until("all is copied", || sandbox.json(&["recovery", "vm"])["state"] == "ready-for-cutover");
    sandbox.ok(&["cutover", "vm"]);
    let kept = daemon.virsh(&["dumpxml", "--inactive", "vm"]);
    assert!(kept.contains(&target) && !kept.contains("nbd"), "{kept}");
    console.count_on(5);

    // It is in production: its next start is from there alone.
    daemon.virsh(&["destroy", "vm"]);
    let promised = console.last_number("seq ").unwrap();
    wait_until("the end is seen", || sandbox.json(&["recovery", "vm"])["vm"] == "shut-off");
    sandbox.ok(&["discard", "vm"]);
    assert!(daemon.knows("vm"), "a domain in production stays when its recovery ends");
    holds_all(&sandbox, &target, promised);
    daemon.virsh(&["start", "vm"]);
    wait_for_domain(&daemon, "vm", "running");
    daemon.virsh(&["destroy", "vm"]);
    daemon.virsh(&["undefine", "vm"]);
}

#[test]
fn what_cannot_be_recovered_leaves_nothing_behind_in_libvirt() {
    let Some((sandbox, mut daemon)) = prepared() else { return };
    let on = format!("libvirt:{}", daemon.uri());
    let other = sandbox.path("other.xml");
    let xml = "<domain type='qemu'><name>vm</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
               <os><type arch='x86_64' machine='q35'>hvm</type></os></domain>";
    fs::write(&other, xml).unwrap();
    daemon.virsh(&["define", other.to_str().unwrap()]);
    let before = daemon.virsh(&["dumpxml", "vm"]);
    let refused = sandbox.fails(5, &["recover", "vm", "--on", &on]);
    assert!(refused.contains("there is a domain vm") && refused.contains("--name"), "{refused}");
    assert_eq!(daemon.virsh(&["dumpxml", "vm"]), before, "the original was touched");

    let refused =
        sandbox.fails(1, &["recover", "vm", "--name", "odd", "--on", &on, "--machine-type", "abacus", "--persistent"]);
    assert!(refused.contains("abacus"), "{refused}");
    let refused = sandbox.fails(1, &["recover", "vm", "--name", "odd", "--on", &on, "--network", "bridge:nowhere"]);
    assert!(refused.contains("nowhere"), "{refused}");
    assert!(!daemon.knows("odd"));
    for uri in ["libvirt:", "libvirt:xen:///", "libvirt:qemu"] {
        assert!(sandbox.fails(2, &["recover", "vm", "--on", uri]).contains("libvirt"), "{uri}");
    }
    let refused = sandbox.fails(5, &["recover", "vm", "--on", "libvirt:qemu+tcp://192.0.2.1/system"]);
    assert!(refused.contains("another host"), "{refused}");

    // The domain goes with its recovery, and also if the daemon was away when that ended.
    let (_, mut console) = daemon.recover(&sandbox, &["--name", "brief", "--persistent"]);
    console.count_on(2);
    daemon.kill();
    let refused = sandbox.fails(1, &["discard", "brief"]);
    assert!(refused.contains("libvirt"), "{refused}");
    daemon.start_again();
    sandbox.ok(&["discard", "brief"]);
    assert!(!daemon.knows("brief"));
    daemon.kill();
    let refused = sandbox.fails(1, &["recover", "vm", "--name", "late", "--on", &on]);
    assert!(refused.contains("cannot connect to libvirt"), "{refused}");
    assert!(sandbox.json(&["recoveries"]).as_array().unwrap().is_empty());
}

#[test]
fn a_domain_is_backed_up_as_it_runs_and_recovered_beside_the_original() {
    let Some((sandbox, daemon)) = prepared() else { return };
    let on = format!("libvirt:{}", daemon.uri());
    let disk = sandbox.name("web.raw");
    fs::copy(guest(Guest::Counter), &disk).unwrap();
    let (console, medium) = (sandbox.name("web.console"), sandbox.name("medium.iso"));
    fs::write(&medium, vec![0; 1 << 20]).unwrap();
    let xml = format!(
        "<domain type='qemu'><name>web</name><memory unit='MiB'>384</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features><cpu mode='maximum'/><devices>\
         <disk type='file' device='disk'><driver name='qemu' type='raw' cache='unsafe'/><source file='{disk}'/>\
         <target dev='vda' bus='virtio'/></disk>\
         <disk type='file' device='cdrom'><source file='{medium}'/><target dev='sda' bus='sata'/><readonly/></disk>\
         <interface type='user'><mac address='52:54:00:77:66:55'/><model type='virtio'/></interface>\
         <serial type='file'><source path='{console}'/></serial></devices></domain>"
    );
    let file = sandbox.path("web.xml");
    fs::write(&file, xml).unwrap();
    daemon.virsh(&["define", file.to_str().unwrap()]);

    // Shut off: its image is read.
    let listed = sandbox.json(&["machines", "--on", &on]);
    assert_eq!((&listed[0]["name"], &listed[0]["state"]), (&"web".into(), &"shut-off".into()), "{listed}");
    assert_eq!(listed[0]["disks"][0]["source"], disk, "{listed}");
    sandbox.ok(&["backup", "libvirt:web", "--connect", &daemon.uri()]);
    let first = sandbox.json(&["show", "web"]);
    assert_eq!(first["disks"][0]["name"], "vda", "{first}");

    // Running: as it was at one instant, from libvirt's own export.
    daemon.virsh(&["start", "web"]);
    let mut original = Console::new(&console);
    original.wait_for("seq 3");
    let promised = original.last_number("seq ").unwrap();
    sandbox.ok(&["backup", &format!("{on}#web")]);
    let refused = sandbox.fails(1, &["backup", &format!("{on}#web"), "--freeze"]);
    assert!(refused.contains("freeze") && refused.contains("qemu-guest-agent"), "{refused}");
    assert!(sandbox.fails(4, &["backup", &format!("{on}#nobody")]).contains("no domain nobody"));
    assert_eq!(daemon.virsh(&["domjobinfo", "web"]).split_whitespace().last(), Some("None"), "the job is over");

    // Beside the original: its hardware, but neither its name, nor its identity, nor its network.
    let view = sandbox.json(&["recover", "web", "--name", "twin", "--on", &on]);
    let mut twin = Console::new(view["console"].as_str().unwrap());
    let changes = view["warnings"].to_string();
    assert!(changes.contains("network card 1") && changes.contains("medium in sda"), "{changes}");
    let made = daemon.virsh(&["dumpxml", "twin"]);
    for gone in ["52:54:00:77:66:55", &disk, daemon.virsh(&["domuuid", "web"]).trim()] {
        assert!(!made.contains(gone), "{gone} is in {made}");
    }
    assert!(made.contains("393216</memory>") && made.contains("nbd.sock"), "{made}");
    let kept = twin.next_number("log ok last=");
    assert!(kept >= promised, "the guest had synced record {promised}, the backup holds {kept}");
    twin.wait_for("slots ok");
    let reached = original.last_number("seq ").unwrap();
    original.wait_for(&format!("seq {}", reached + 2));
    sandbox.ok(&["discard", "twin"]);
    assert!(!daemon.knows("twin") && daemon.knows("web"));
    daemon.virsh(&["destroy", "web"]);
}
