//! What a machine is made of is kept with its recovery points, and a recovery is made of the same.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;

use lifeboat_tests::{Console, Guest, Sandbox, guest, have, noise, wait_until};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;

#[test]
fn what_a_machine_is_made_of_is_kept_and_holds_for_later_points() {
    let sandbox = Sandbox::with_plain_repository("64K");
    let [root, data, vars] = ["root", "data", "vars"].map(|name| sandbox.name(name));
    for (seed, path) in [(1, &root), (2, &data), (3, &vars)] {
        fs::write(path, noise(seed, MIB / 4)).unwrap();
    }
    let (root, data) = (format!("root={root}"), format!("data={data}"));
    let flags = ["--memory", "3G", "--cpus", "3", "--cpu", "Haswell", "--machine-type", "q35", "--bus", "virtio-scsi"];
    let more = ["--bus", "data=nvme", "--nic", "e1000e", "--mac", "52:54:00:aa:bb:cc", "--uefi-vars", &vars];
    sandbox.ok(&[&["backup", "vm", &root, &data], &flags[..], &more].concat());

    let kept = sandbox.json(&["show", "vm", "--hardware"]);
    for (field, value) in [
        ("kind", json!("lifeboat-machine")),
        ("memory", json!(3_u64 << 30)),
        ("cpus", json!(3)),
        ("cpu", json!("Haswell")),
        ("machine_type", json!("q35")),
        ("firmware", json!("uefi")),
        ("bus", json!("virtio-scsi")),
        ("disks", json!([{ "name": "data", "bus": "nvme" }])),
        ("nic", json!({ "model": "e1000e", "mac": "52:54:00:aa:bb:cc" })),
    ] {
        assert_eq!(kept[field], value, "{field} in {kept}");
    }
    assert_eq!(kept["uefi_vars"].as_str().unwrap().len(), (MIB / 4).div_ceil(3) * 4);
    let shown = sandbox.ok(&["show", "vm"]);
    for word in ["3072 MiB", "3 CPUs", "Haswell", "UEFI variables (256 KiB)", "data on nvme", "52:54:00:aa:bb:cc"] {
        assert!(shown.contains(word), "{word} is not in {shown}");
    }
    // The variables are long, and only the full definition has them.
    assert_eq!(sandbox.json(&["show", "vm"])["hardware"]["uefi_vars"], Value::Null);

    // Later points say the same, but for what is said anew; a disk that is gone is forgotten.
    sandbox.ok(&["backup", "vm", &root, &data]);
    assert_eq!(sandbox.json(&["show", "vm", "--hardware"]), kept);
    sandbox.ok(&["backup", "vm", &root, "--cpus", "1", "--firmware", "bios"]);
    let changed = sandbox.json(&["show", "vm", "--hardware"]);
    assert_eq!((&changed["cpus"], &changed["memory"]), (&json!(1), &kept["memory"]));
    assert_eq!((&changed["firmware"], &changed["uefi_vars"]), (&json!("bios"), &Value::Null));
    assert_eq!(changed["disks"], Value::Null);

    // What is printed can be given, to another machine too.
    let file = sandbox.name("vm.json");
    fs::write(&file, kept.to_string()).unwrap();
    sandbox.ok(&["backup", "other", &root, &data, "--hardware", &file]);
    assert_eq!(sandbox.json(&["show", "other", "--hardware"]), kept);
    sandbox.ok(&["backup", "plain", &root]);
    assert_eq!(sandbox.json(&["show", "plain", "--hardware"]), Value::Null);
    assert!(sandbox.ok(&["show", "plain"]).contains("not known"));
}

#[test]
fn a_machine_that_cannot_be_is_refused_before_anything_is_done() {
    let sandbox = Sandbox::with_plain_repository("64K");
    let disk = sandbox.name("disk");
    fs::write(&disk, noise(1, MIB)).unwrap();
    let empty = sandbox.name("empty");
    fs::write(&empty, "").unwrap();
    let newer = sandbox.name("newer");
    fs::write(&newer, json!({ "kind": "abacus" }).to_string()).unwrap();
    for (flags, word) in [
        (&["--memory", "1K"][..], "memory"),
        (&["--cpus", "0"], "CPUs"),
        (&["--cpu", "a b"], "CPU model"),
        (&["--firmware", "coreboot"], "coreboot"),
        (&["--bus", "floppy"], "floppy"),
        (&["--bus", "disk7=sata"], "no disk disk7"),
        (&["--bus", "sata", "--bus", "nvme"], "twice"),
        (&["--nic", "ne2000"], "ne2000"),
        (&["--mac", "52:54"], "MAC"),
        (&["--uefi-vars", &empty], "UEFI variables"),
        (&["--uefi-vars", &disk, "--firmware", "bios"], "BIOS"),
        (&["--hardware", &disk], "definition"),
        (&["--hardware", &newer], "abacus"),
    ] {
        let said = sandbox.fails(2, &[&["backup", "vm", &disk], flags].concat());
        assert!(said.contains(word), "{flags:?}: {said}");
    }
    assert!(sandbox.fails(1, &["backup", "vm", &disk, "--uefi-vars", "/nowhere"]).contains("/nowhere"));
    assert!(sandbox.json(&["points"]).as_array().unwrap().is_empty());
    sandbox.ok(&["backup", "vm", &disk]);
    for (flags, word) in [
        (["--mac", "keep"], "does not say"),
        (["--mac", "01:00:00:00:00:00"], "MAC"),
        (["--display", "vnc:80"], "5900"),
        (["--display", "sdl"], "sdl"),
        (["--bus", "disk7=sata"], "no disk disk7"),
    ] {
        let said = sandbox.fails(2, &[&["recover", "vm"], &flags[..]].concat());
        assert!(said.contains(word), "{flags:?}: {said}");
    }
    assert!(sandbox.json(&["recoveries"]).as_array().unwrap().is_empty());
}

/// The words QEMU was started with.
fn arguments(view: &Value) -> String {
    let bytes = fs::read(format!("/proc/{}/cmdline", view["pid"])).unwrap();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

#[test]
fn a_machine_boots_as_its_point_says_and_a_commit_says_it_again() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let sandbox = Sandbox::with_repository();
    let root = format!("root={}", guest(Guest::Uefi).display());
    let names = ["b", "c", "d"].map(|name| {
        fs::write(sandbox.path(name), noise(9, MIB)).unwrap();
        format!("{name}={}", sandbox.name(name))
    });
    let [b, c, d] = &names;
    let flags = ["--memory", "512M", "--cpus", "1", "--cpu", "max", "--firmware", "uefi", "--nic", "e1000e"];
    let buses = ["--bus", "root=nvme", "--bus", "b=virtio-scsi", "--bus", "c=sata", "--bus", "d=nvme"];
    let card = ["--mac", "52:54:00:01:02:03"];
    sandbox.ok(&[&["backup", "vm", &root, b, c, d], &flags[..], &buses, &card].concat());

    let view = sandbox.json(&["recover", "vm", "--network", "user", "--display", "vnc", "--mac", "keep"]);
    let started = arguments(&view);
    for part in ["-m 512M", "-smp 1", "-cpu max", "nvme,id=device0", "scsi-hd", "ide-hd", "nvme,id=device3", "e1000e,"]
    {
        assert!(started.contains(part), "{part} is not in {started}");
    }
    assert!(started.contains("mac=52:54:00:01:02:03"), "{started}");
    let screen = view["display"].as_str().unwrap().strip_prefix("vnc+unix://").unwrap();
    let mut greeting = [0; 4];
    UnixStream::connect(screen).unwrap().read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"RFB ");
    let mut console = Console::new(view["console"].as_str().unwrap());
    assert_eq!(console.next_number("up boot="), 1);
    console.wait_for("record 1 synced");
    wait_until("the guest has powered itself off", || sandbox.json(&["recovery", "vm"])["vm"] == "shut-off");

    // Variables that no firmware would write, to know them again.
    let vars = sandbox.path("state/recoveries/vm/uefi-vars.fd");
    let mut bytes = fs::read(&vars).unwrap();
    let end = bytes.len() - 8;
    bytes[end..].copy_from_slice(b"lifeboat");
    fs::write(&vars, &bytes).unwrap();
    sandbox.ok(&["commit", "vm"]);
    let kept = sandbox.json(&["show", "vm", "--hardware"]);
    assert_eq!((&kept["memory"], &kept["firmware"]), (&json!(512 * MIB), &json!("uefi")));
    assert_eq!(kept["disks"][1], json!({ "name": "b", "bus": "virtio-scsi" }));
    assert_eq!(kept["nic"], json!({ "model": "e1000e", "mac": "52:54:00:01:02:03" }));
    sandbox.ok(&["discard", "vm"]);

    // The point that was committed boots with these variables and nothing said, on a card of its own.
    let view = sandbox.json(&["recover", "vm", "--name", "again", "--network", "isolated"]);
    assert!(!arguments(&view).contains("52:54:00:01:02:03"));
    let vars = sandbox.path("state/recoveries/again/uefi-vars.fd");
    assert!(fs::read(&vars).unwrap().ends_with(b"lifeboat"));
    let mut console = Console::new(view["console"].as_str().unwrap());
    assert_eq!(console.next_number("up boot="), 2);
    console.wait_for("record 2 synced");
    sandbox.ok(&["discard", "again"]);
    assert_eq!(fs::read_dir(sandbox.path("state/recoveries")).unwrap().count(), 0);
}
