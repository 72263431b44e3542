use super::*;
use crate::definition::{Bus, Firmware, MachineDefinition, MachineDisk, MachineFiles};

/// What virsh gives of a domain that uses much of what libvirt can.
const CAPTURED: &str = include_str!("captured.xml");

fn nbd() -> DiskSource {
    DiskSource::Export { socket: "/run/lb/nbd.sock".into(), export: "vda".to_owned() }
}

fn recast_with(change: impl FnOnce(&mut Recast<'_>)) -> (Element, Recasting) {
    let disks = [("vda".to_owned(), nbd()), ("sdb".to_owned(), nbd())];
    let mut how = Recast {
        name: "web01-recovered",
        uuid: Uuid::Fresh,
        macs: Macs::Fresh,
        random: || [0xab; 16],
        disks: &disks,
        network: recast::Network::Original,
        console: "/r/console.log",
        uefi_vars: Some("/r/uefi-vars.fd"),
        memory: None,
        cpus: None,
        has_program: |_| true,
    };
    change(&mut how);
    let made = recast(CAPTURED, &how).expect("it can be recast");
    (Element::parse(&made.xml, "domain").expect("it is well formed"), made)
}

fn devices<'a>(domain: &'a Element, name: &str) -> Vec<&'a Element> {
    domain.child("devices").expect("it has devices").elements().filter(|element| element.name == name).collect()
}

#[test]
fn a_recast_domain_shares_neither_name_nor_identity_with_the_original() {
    let (domain, made) = recast_with(|_| {});
    assert_eq!(domain.child("name").map(Element::text).as_deref(), Some("web01-recovered"));
    assert_eq!(made.uuid, "abababab-abab-4bab-abab-abababababab");
    assert_eq!(domain.child("uuid").map(Element::text), Some(made.uuid));
    assert_eq!(domain.child("genid").map(Element::text).as_deref(), Some("abababab-abab-4bab-abab-abababababab"));
    assert_eq!(domain.attribute("id"), None);
    let original = Element::parse(CAPTURED, "domain").expect("it is well formed");
    let macs = |domain: &Element| -> Vec<String> {
        let cards = devices(domain, "interface").into_iter();
        cards.filter_map(|card| card.child("mac")?.attribute("address").map(str::to_owned)).collect()
    };
    assert!(macs(&domain).iter().all(|mac| !macs(&original).contains(mac)), "{domain:?}");
    let entries = domain.at(&["sysinfo", "system"]).expect("it has one");
    assert!(entries.elements().all(|entry| entry.attribute("name") != Some("uuid")), "{}", entries.to_xml());
    assert!(entries.elements().any(|entry| entry.attribute("name") == Some("serial")), "{}", entries.to_xml());
}

#[test]
fn the_original_s_identity_is_kept_on_request() {
    let (domain, made) = recast_with(|how| {
        how.uuid = Uuid::Keep;
        how.macs = Macs::Keep;
    });
    assert_eq!(made.uuid, "5c4fbf9d-a453-4d47-9fd7-2678313c73bb");
    assert!(made.xml.contains("52:54:00:11:22:33"));
    assert_ne!(domain.child("genid").map(Element::text).as_deref(), Some("43dc0cf8-809b-4adb-9bea-a9abb5f3d90e"));
    let (_, made) = recast_with(|how| how.macs = Macs::First("52:54:00:00:00:01".to_owned()));
    assert!(made.xml.contains("52:54:00:00:00:01") && made.xml.contains("52:54:00:ab:ab:ab"), "{}", made.xml);
}

#[test]
fn disks_are_on_the_exports_and_nothing_else_of_theirs_is_left() {
    let (domain, made) = recast_with(|_| {});
    let disks = devices(&domain, "disk");
    let named = |target: &str| *disks.iter().find(|disk| target_of(disk) == Some(target)).expect("it is there");
    let vda = named("vda");
    assert_eq!(vda.attribute("type"), Some("network"));
    let source = vda.child("source").expect("it has one");
    assert_eq!((source.attribute("protocol"), source.attribute("name")), (Some("nbd"), Some("vda")));
    assert_eq!(source.child("host").and_then(|host| host.attribute("socket")), Some("/run/lb/nbd.sock"));
    assert_eq!(source.child("reconnect").and_then(|wait| wait.attribute("delay")), Some("86400"));
    let driver = vda.child("driver").expect("it has one");
    assert_eq!((driver.attribute("type"), driver.attribute("iothread")), (Some("raw"), Some("1")));
    assert_eq!((driver.attribute("cache"), driver.attribute("io")), (None, None));
    assert_eq!(driver.attribute("error_policy"), Some("stop"));
    for gone in ["backingStore", "auth", "encryption", "mirror"] {
        assert!(vda.child(gone).is_none(), "{gone}");
    }
    for kept in ["serial", "address", "boot"] {
        assert!(vda.child(kept).is_some(), "{kept}");
    }
    assert_eq!(named("sdb").at(&["source", "reconnect"]).and_then(|wait| wait.attribute("delay")), Some("20"));
    assert_eq!(named("sdc").child("source"), None, "the medium is out");
    assert!(disks.iter().all(|disk| target_of(disk) != Some("vdz")), "{made:?}");
    for told in ["medium in sdc", "disk vdz is left out"] {
        assert!(made.changes.iter().any(|change| change.contains(told)), "{told}: {:?}", made.changes);
    }
    for path in ["/var/lib/libvirt/images", "secret", "snapshot"] {
        assert!(!made.xml.contains(path), "{path}: {}", made.xml);
    }
}

#[test]
fn nothing_of_the_host_is_taken_hold_of() {
    let (domain, made) = recast_with(|_| {});
    for gone in ["hostdev", "filesystem", "redirdev", "shmem", "parallel", "lease"] {
        assert!(devices(&domain, gone).is_empty(), "{gone}");
    }
    for gone in ["seclabel", "cputune", "numatune", "resource", "qemu:commandline"] {
        assert!(domain.child(gone).is_none(), "{gone}");
    }
    for told in
        ["a device of the host", "a shared folder", "network card 2 (direct)", "arguments passed to QEMU", "pinned"]
    {
        assert!(made.changes.iter().any(|change| change.contains(told)), "{told}: {:?}", made.changes);
    }
    let screen = devices(&domain, "graphics");
    assert_eq!(screen.len(), 2);
    assert!(screen.iter().all(|one| one.attribute("passwd").is_none() && one.attribute("port") == Some("-1")));
    assert!(!made.xml.contains("0.0.0.0"), "{}", made.xml);
    assert_eq!(domain.at(&["os", "nvram"]).map(Element::text).as_deref(), Some("/r/uefi-vars.fd"));
    assert_eq!(
        domain.at(&["os", "nvram"]).and_then(|nvram| nvram.attribute("template")),
        Some("/usr/share/OVMF/OVMF_VARS_4M.fd")
    );
    let serial = devices(&domain, "serial");
    assert_eq!(serial[0].child("source").and_then(|source| source.attribute("path")), Some("/r/console.log"));
    assert_eq!(serial[1].attribute("type"), Some("pty"));
    let agent = devices(&domain, "channel");
    assert!(agent.iter().all(|channel| channel.child("source").is_none()), "{agent:?}");
    assert!(agent.iter().any(|channel| channel.attribute("type") == Some("spicevmc")), "{agent:?}");
}

#[test]
fn cards_follow_what_is_asked_for() {
    for (network, kinds) in [
        (recast::Network::None, vec![]),
        (recast::Network::Original, vec![Some("network"), Some("bridge")]),
        (recast::Network::User, vec![Some("user")]),
        (recast::Network::Bridge("br9".to_owned()), vec![Some("bridge")]),
    ] {
        let (domain, made) = recast_with(|how| how.network = network.clone());
        let found: Vec<_> = devices(&domain, "interface").iter().map(|card| card.attribute("type")).collect();
        assert_eq!(found, kinds, "{network:?}");
        assert_eq!(made.xml.contains("br9"), matches!(network, recast::Network::Bridge(_)));
    }
}

#[test]
fn size_and_emulator_follow_what_is_asked_for_and_there() {
    let (domain, made) = recast_with(|how| {
        how.memory = Some(3 << 30);
        how.cpus = Some(7);
        how.has_program = |_| false;
    });
    assert_eq!(size(&made.xml), Ok((3 << 30, 7)));
    assert_eq!(domain.child("currentMemory"), None);
    assert_eq!(domain.at(&["cpu", "topology"]), None);
    assert!(devices(&domain, "emulator").is_empty());
    assert_eq!(size(CAPTURED), Ok((4 << 30, 4)));
}

#[test]
fn a_domain_without_kvm_asks_for_nothing_that_only_kvm_has() {
    let (_, made) = recast_with(|_| {});
    assert!(uses_kvm(&made.xml));
    let emulated = with_accelerator(&made.xml, false).expect("it is well formed");
    let domain = Element::parse(&emulated, "domain").expect("it is well formed");
    assert_eq!(domain.attribute("type"), Some("qemu"));
    assert_eq!(domain.child("cpu").and_then(|cpu| cpu.attribute("mode")), Some("maximum"));
    assert_eq!(domain.at(&["features", "hyperv"]), None);
    assert!(!emulated.contains("kvmclock") && emulated.contains("<apic"), "{emulated}");
    assert_eq!(with_accelerator(&made.xml, true).as_ref(), Ok(&made.xml));
    assert!(!uses_kvm(&emulated));
}

#[test]
fn a_disk_that_the_domain_does_not_have_is_an_error() {
    let nowhere = [("vdq".to_owned(), nbd())];
    let (_, made) = recast_with(|_| {});
    let missing = Err(XmlError::Missing { what: "disk" });
    assert_eq!(with_sources(&made.xml, [("vdq", &nowhere[0].1)]), missing);
    let how = Recast { disks: &nowhere, ..template() };
    assert_eq!(recast(CAPTURED, &how).map(|made| made.xml), missing);
    assert!(recast("<domain/>", &template()).is_err());
    assert!(matches!(recast("<pool/>", &template()), Err(XmlError::Root { .. })));
}

fn template() -> Recast<'static> {
    Recast {
        name: "x",
        uuid: Uuid::Fresh,
        macs: Macs::Fresh,
        random: || [1; 16],
        disks: &[],
        network: recast::Network::None,
        console: "/c",
        uefi_vars: None,
        memory: None,
        cpus: None,
        has_program: |_| true,
    }
}

#[test]
fn production_sources_leave_no_trace_of_the_export() {
    let (_, made) = recast_with(|_| {});
    let targets =
        [("vda", DiskSource::Qcow2("/vm/a&b's.qcow2".into())), ("sdb", DiskSource::Device("/dev/vg/sdb".into()))];
    let moved =
        with_sources(&made.xml, targets.iter().map(|(target, source)| (*target, source))).expect("both are there");
    let moved = without_console_file(&moved).expect("it is well formed");
    assert!(!moved.contains("nbd") && !moved.contains("/r/console.log"), "{moved}");
    let found = disks(&moved).expect("it is well formed");
    let of = |index: usize| (found[index].source.clone(), found[index].format.as_str());
    assert_eq!(of(0), (CapturedSource::Path("/vm/a&b's.qcow2".into()), "qcow2"));
    assert_eq!(of(1), (CapturedSource::Path("/dev/vg/sdb".into()), "raw"));
}

#[test]
fn a_domain_knows_whose_it_is() {
    let (_, made) = recast_with(|_| {});
    assert_eq!(owner(&made.xml), None);
    let ours = with_owner(&made.xml, "/s/recoveries/<web>&'1'", Keep::Transient).expect("it is well formed");
    assert_eq!(owner(&ours).as_deref(), Some("/s/recoveries/<web>&'1'"));
    assert!(!is_in_production(&ours));
    let again = with_owner(&ours, "/b", Keep::Production).expect("it is well formed");
    assert_eq!(owner(&again).as_deref(), Some("/b"));
    assert!(is_in_production(&again));
    assert_eq!(again.matches("<lifeboat:recovery").count(), 1);
    assert!(again.contains("libosinfo"), "what others noted stays: {again}");
}

#[test]
fn captured_disks_say_where_they_are() {
    let found = disks(CAPTURED).expect("it is well formed");
    let targets: Vec<&str> = found.iter().map(|disk| disk.target.as_str()).collect();
    assert_eq!(targets, ["vda", "sdb", "vdz"]);
    assert_eq!(found[0].source, CapturedSource::Path("/var/lib/libvirt/images/web01.snapshot2".into()));
    assert_eq!((found[0].format.as_str(), found[0].encrypted), ("qcow2", true));
    assert_eq!(found[2].source, CapturedSource::Other("rbd pool/image".to_owned()));
}

#[test]
fn a_created_domain_is_what_its_definition_says() {
    let mut machine = MachineDefinition::new("a<b", MachineFiles::in_folder(std::path::Path::new("/r")));
    machine.firmware = Firmware::Uefi;
    machine.cpus = 3;
    machine.network = crate::definition::Network::Bridge("br0".to_owned());
    machine.disks = (0..30)
        .map(|index| MachineDisk { name: format!("disk{index}"), source: nbd(), bus: Bus::VirtioScsi })
        .collect();
    let xml = create(&machine, "5c4fbf9d-a453-4d47-9fd7-2678313c73bb", Some("/r/vars"));
    let domain = Element::parse(&xml, "domain").expect("it is well formed");
    assert_eq!(domain.child("name").map(Element::text).as_deref(), Some("a<b"));
    assert_eq!(size(&xml), Ok((1 << 30, 3)));
    let targets: Vec<String> = disks(&xml).expect("it is well formed").into_iter().map(|disk| disk.target).collect();
    assert_eq!((targets[0].as_str(), targets[25].as_str(), targets[26].as_str()), ("sda", "sdz", "sdaa"));
    assert_eq!(domain.at(&["os", "nvram"]).map(Element::text).as_deref(), Some("/r/vars"));
    assert_eq!(devices(&domain, "interface").len(), 1);
    assert_eq!(
        copy_target(&DiskSource::Raw("/x".into()), 4096),
        "<disk type='file'>\n  <source file='/x'/>\n  <driver name='qemu' type='raw'/>\n</disk>\n"
    );
}

#[test]
fn the_user_of_qemu_is_read_from_the_capabilities() {
    let text = "<capabilities><host><secmodel><model>apparmor</model></secmodel><secmodel><model>dac</model><doi>0</doi>\
                <baselabel type='kvm'>+64055:+109</baselabel></secmodel></host></capabilities>";
    assert_eq!(qemu_user(text), Some(64055));
    assert_eq!(qemu_user("<capabilities><host/></capabilities>"), None);
    assert_eq!(qemu_user("no"), None);
}

#[test]
fn a_running_disk_tells_where_it_is_and_whether_its_copy_follows() {
    let (_, made) = recast_with(|_| {});
    let live = |xml: &str| live_disk(xml, "vda", &nbd()).expect("it is there");
    assert_eq!(live(&made.xml), LiveDisk { on_source: true, copy_ready: false, copy_index: None });
    let copied = made.xml.replace(
        "<target dev='vda'",
        "<mirror type='file' job='copy' ready='yes'><source file='/x' index='4'/></mirror><target dev='vda'",
    );
    assert_eq!(live(&copied), LiveDisk { on_source: true, copy_ready: true, copy_index: Some(4) });
    let raw = DiskSource::Raw("/x".into());
    let moved = with_sources(&made.xml, [("vda", &raw)]).expect("it is there");
    assert!(!live(&moved).on_source);
    assert!(live_disk(&moved, "vda", &raw).expect("it is there").on_source);
    let other = DiskSource::Export { socket: "/other".into(), export: "vda".to_owned() };
    assert!(!live_disk(&made.xml, "vda", &other).expect("it is there").on_source);
}

#[test]
fn what_is_understood_of_a_domain_serves_other_hypervisors() {
    let known = summary(CAPTURED).expect("it is well formed");
    assert_eq!((known.memory, known.cpus), (Some(4 << 30), Some(4)));
    assert_eq!(known.machine_type.as_deref(), Some("pc-q35-7.2"));
    assert!(known.uefi);
    assert_eq!(known.uefi_vars.as_deref(), Some(std::path::Path::new("/var/lib/libvirt/qemu/nvram/web01_VARS.fd")));
    assert_eq!(known.buses[..2], [("vda".to_owned(), "virtio".to_owned()), ("sdb".to_owned(), "sata".to_owned())]);
    assert_eq!((known.card.as_deref(), known.mac.as_deref()), (Some("virtio"), Some("52:54:00:11:22:33")));
}
