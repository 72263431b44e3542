use super::*;

fn at(socket: &str) -> DiskSource {
    DiskSource::Export { socket: socket.into(), export: "root".into() }
}

fn machine() -> MachineDefinition {
    let mut machine = MachineDefinition::new("web01", MachineFiles::in_folder(Path::new("/run/web01")));
    machine.disks.push(MachineDisk { name: "root".into(), source: at("/run/web01/disk0.sock"), bus: Bus::VirtioBlk });
    machine
}

#[test]
fn an_ordinary_machine_passes() {
    assert_eq!(machine().check(), Ok(()));
}

#[test]
fn a_socket_path_is_refused_from_108_bytes_on() {
    let mut machine = machine();
    machine.disks[0].source = at(&format!("/{}", "s".repeat(106)));
    assert_eq!(machine.check(), Ok(()));
    machine.disks[0].source = at(&format!("/{}", "s".repeat(107)));
    assert!(matches!(machine.check(), Err(DefinitionError::SocketPathTooLong { length: 108, .. })));
}

#[test]
fn the_control_socket_counts_too() {
    let mut machine = machine();
    machine.files.qmp = PathBuf::from(format!("/{}", "q".repeat(104)));
    assert!(matches!(machine.check(), Err(DefinitionError::SocketPathTooLong { .. })));
}

#[test]
fn relative_paths_and_control_characters_are_refused() {
    let mut relative = machine();
    relative.files.log = "qemu.log".into();
    assert!(matches!(relative.check(), Err(DefinitionError::RelativePath { .. })));
    let mut name = machine();
    name.name = "a\nb".into();
    assert!(matches!(name.check(), Err(DefinitionError::Name { .. })));
    let mut path = machine();
    path.files.console = "/run/a\nb".into();
    assert!(matches!(path.check(), Err(DefinitionError::UnprintablePath { .. })));
}

#[test]
fn ide_needs_the_old_machine() {
    let mut machine = machine();
    machine.disks[0].bus = Bus::Ide;
    assert!(matches!(machine.check(), Err(DefinitionError::NoIde { .. })));
    machine.machine_type = "pc".into();
    assert_eq!(machine.check(), Ok(()));
}

#[test]
fn addresses_are_checked_and_otherwise_follow_from_the_name() {
    let mut machine = machine();
    assert_eq!(machine.mac(), machine.mac());
    assert!(machine.mac().starts_with("52:54:00:"));
    for bad in ["", "52:54:00:12:34", "53:54:00:12:34:56", "52:54:00:12:34:5g", "52:54:0:12:34:56", "+2:54:00:12:34:56"]
    {
        machine.mac_address = Some(bad.into());
        assert!(machine.check().is_err(), "{bad}");
    }
    machine.mac_address = Some("52:54:00:AB:34:56".into());
    assert_eq!(machine.check(), Ok(()));
    assert_eq!(machine.mac(), "52:54:00:ab:34:56");
}

#[test]
fn a_definition_survives_json_and_old_json_without_the_newer_fields() {
    let machine = machine();
    let mut json = serde_json::to_value(&machine).expect("a definition is plain data");
    let back: MachineDefinition = serde_json::from_value(json.clone()).expect("what was written can be read");
    assert_eq!(back, machine);
    for newer in ["errors", "card", "display"] {
        json.as_object_mut().expect("a definition is an object").remove(newer).expect("it is written");
    }
    let back: MachineDefinition = serde_json::from_value(json).expect("what is newer has a default");
    assert_eq!(back, machine);
}

#[test]
fn networks_are_read_as_written() {
    for text in ["none", "user", "isolated", "bridge:br0"] {
        assert_eq!(text.parse::<Network>().map(|network| network.to_string()), Ok(text.to_owned()));
    }
    assert!("bridge:".parse::<Network>().is_err());
    assert!("wifi".parse::<Network>().is_err());
}

#[test]
fn buses_and_cards_are_read_as_written() {
    for text in ["virtio-blk", "virtio-scsi", "sata", "ide", "nvme"] {
        assert_eq!(text.parse::<Bus>().map(|bus| bus.to_string()), Ok(text.to_owned()));
    }
    for text in ["virtio", "e1000e", "e1000", "rtl8139"] {
        assert_eq!(text.parse::<Card>().map(|card| card.to_string()), Ok(text.to_owned()));
    }
    assert!("floppy".parse::<Bus>().is_err() && "ne2000".parse::<Card>().is_err());
}

#[test]
fn a_cpu_model_is_one_word_and_its_features() {
    let mut machine = machine();
    for (model, good) in
        [("host", true), ("Skylake-Client-v3,-hle", true), ("", false), (",x", false), ("a b", false), ("a\n", false)]
    {
        machine.cpu_model = Some(model.to_owned());
        assert_eq!(machine.check().is_ok(), good, "{model:?}");
    }
}
