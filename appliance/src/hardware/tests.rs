use super::*;
use proptest::prelude::*;

/// As version 1 writes it. Kept for ever: points have it.
const FIXTURE: &str = include_str!("fixture-v1.json");

fn sample() -> Hardware {
    let attached = |name: &str, bus: &str| Attached { name: name.into(), bus: bus.into() };
    Hardware {
        memory: Some(2 << 30),
        cpus: Some(4),
        cpu: Some("host".into()),
        machine_type: Some("q35".into()),
        firmware: Some("uefi".into()),
        uefi_vars: Some(Variables(vec![0, 1, 2, 255])),
        bus: Some("virtio-scsi".into()),
        disks: vec![attached("root", "nvme"), attached("data", "sata")],
        nic: Nic { model: Some("e1000e".into()), mac: Some("52:54:00:12:34:56".into()) },
        ..Hardware::default()
    }
}

#[test]
fn what_the_first_version_wrote_is_read_and_written_the_same() {
    let fixtures: Vec<Value> = serde_json::from_str(FIXTURE).unwrap();
    let [machine, domain] = fixtures.as_slice() else { panic!("two fixtures") };
    assert_eq!(Hardware::read(machine), Ok(sample()));
    assert_eq!(&sample().to_value(), machine);
    let read = Hardware::read(domain).unwrap();
    assert_eq!((read.kind, read.domain_xml.as_deref()), (Kind::LibvirtXml, Some("<domain type='kvm'/>")));
    assert_eq!(&read.to_value(), domain);
}

#[test]
fn nothing_is_known_of_a_machine_that_was_never_described() {
    assert_eq!(Hardware::read(&Value::Null), Ok(Hardware::default()));
    assert_eq!(Hardware::default().to_value(), Value::Null);
    let auto = Hardware { firmware: Some("auto".into()), ..Hardware::default() };
    assert_eq!(auto.to_value(), Value::Null);
    assert_eq!(Hardware::default().to_string(), "not known");
}

#[test]
fn what_is_newer_is_ignored_or_said_to_be_not_understood() {
    let newer = serde_json::json!({ "kind": "lifeboat-machine", "cpus": 3, "tpm": { "version": 2 } });
    assert_eq!(Hardware::read(&newer).unwrap().cpus, Some(3));
    for bad in [
        serde_json::json!({ "kind": "abacus" }),
        serde_json::json!({ "kind": "lifeboat-machine", "memory": "much" }),
        serde_json::json!({ "kind": "lifeboat-machine", "uefi_vars": "?" }),
        serde_json::json!([1]),
        serde_json::json!({ "kind": "libvirt-xml", "domain_xml": "x".repeat(DOMAIN_XML_MAX + 1) }),
    ] {
        let error = Hardware::read(&bad).unwrap_err().to_string();
        assert!(error.contains("is not understood"), "{error}");
    }
    let word = Hardware { bus: Some("quantum".into()), ..Hardware::default() };
    assert_eq!(Hardware::read(&word.to_value()), Ok(word.clone()), "a word is kept, and refused only when it is used");
    assert!(word.check(["root"].into_iter()).is_err());
}

#[test]
fn the_upper_says_and_the_lower_fills_in() {
    let upper = Hardware { cpus: Some(1), ..Hardware::default() };
    let both = upper.over(sample());
    assert_eq!(both, Hardware { cpus: Some(1), ..sample() });
    let all_on_sata = Hardware { bus: Some("sata".into()), ..Hardware::default() }.over(sample());
    assert_eq!(all_on_sata.bus_of("root").unwrap(), Bus::Sata);
    let one = Hardware { disks: vec![Attached { name: "root".into(), bus: "ide".into() }], ..Hardware::default() };
    let one = one.over(sample());
    assert_eq!(one.bus_of("root").unwrap(), Bus::Ide);
    assert_eq!(one.bus_of("data").unwrap(), Bus::Sata);
    assert_eq!(one.bus_of("other").unwrap(), Bus::VirtioScsi);
}

#[test]
fn variables_mean_uefi_and_bios_means_none() {
    let bios = Hardware { firmware: Some("bios".into()), ..Hardware::default() };
    assert_eq!(bios.clone().over(sample()).uefi_vars, None);
    let variables = Hardware { uefi_vars: Some(Variables(vec![1])), ..Hardware::default() };
    assert_eq!(variables.is_uefi(), Some(true));
    let both = variables.clone().over(bios);
    assert_eq!((both.is_uefi(), both.uefi_vars), (Some(true), variables.uefi_vars.clone()));
    let contradiction = Hardware { firmware: Some("bios".into()), ..variables };
    assert!(contradiction.check(std::iter::empty()).unwrap_err().to_string().contains("no UEFI variables"));
}

#[test]
fn what_no_machine_can_be_made_of_is_refused() {
    let disks = ["root", "data"];
    sample().check(disks.into_iter()).unwrap();
    assert!(sample().check(["root"].into_iter()).unwrap_err().to_string().contains("there is no disk data"));
    let change = |change: fn(&mut Hardware)| {
        let mut hardware = sample();
        change(&mut hardware);
        hardware.check(disks.into_iter())
    };
    for bad in [
        change(|hardware| hardware.memory = Some(1024)),
        change(|hardware| hardware.cpus = Some(0)),
        change(|hardware| hardware.cpus = Some(256)),
        change(|hardware| hardware.cpu = Some("a b".into())),
        change(|hardware| hardware.machine_type = Some(String::new())),
        change(|hardware| hardware.firmware = Some("coreboot".into())),
        change(|hardware| hardware.bus = Some("floppy".into())),
        change(|hardware| hardware.nic.model = Some("ne2000".into())),
        change(|hardware| hardware.nic.mac = Some("01:00:00:00:00:00".into())),
        change(|hardware| hardware.nic.mac = Some("52:54:00".into())),
    ] {
        assert!(bad.is_err());
    }
}

#[test]
fn disks_that_are_gone_are_forgotten() {
    let mut hardware = sample();
    hardware.keep_disks(["data", "new"].into_iter());
    assert_eq!(hardware.disks, [Attached { name: "data".into(), bus: "sata".into() }]);
}

proptest! {
    #[test]
    fn variables_come_back(bytes in proptest::collection::vec(any::<u8>(), 1..500)) {
        let hardware = Hardware { uefi_vars: Some(Variables(bytes)), firmware: Some("uefi".into()), ..Hardware::default() };
        prop_assert_eq!(Hardware::read(&hardware.to_value()), Ok(hardware));
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,200}") {
        let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        let _ = Hardware::read(&value).map(|hardware| hardware.check(std::iter::empty()));
    }
}
