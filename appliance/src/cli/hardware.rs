//! What a command line says of a machine.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::args::MachineArgs;
use crate::hardware::{Attached, Hardware, Nic, VARIABLES_MAX, Variables};
use crate::problem::Problem;

/// A definition holds its UEFI variables as base64, and a libvirt domain.
const DEFINITION_MAX: usize = 8 << 20;

/// The definition, of the file and of what is said besides.
pub fn of(args: &MachineArgs) -> Result<Hardware, Problem> {
    let base = args.hardware.as_deref().map_or(Ok(Hardware::default()), from_file)?;
    let uefi_vars = args.uefi_vars.as_deref().map(|path| read(path, "UEFI variables", VARIABLES_MAX)).transpose()?;
    let (mut bus, mut disks) = (None, Vec::new());
    for text in &args.buses {
        match text.split_once('=') {
            Some((name, bus)) => disks.push(Attached { name: name.to_owned(), bus: bus.to_owned() }),
            None if bus.is_none() => bus = Some(text.clone()),
            None => return Err(Problem::usage("--bus is given twice").hint("name the disks: --bus disk1=sata")),
        }
    }
    let said = Hardware {
        memory: args.memory,
        cpus: args.cpus,
        cpu: args.cpu.clone(),
        machine_type: args.machine_type.clone(),
        firmware: args.firmware.clone(),
        uefi_vars: uefi_vars.map(Variables),
        bus,
        disks,
        nic: Nic { model: args.nic.clone(), mac: None },
        ..Hardware::default()
    };
    if said.uefi_vars.is_some() && said.firmware.as_deref() == Some("bios") {
        return Err(Problem::usage("a machine with BIOS firmware has no UEFI variables")
            .hint("leave out --uefi-vars, or choose --firmware uefi"));
    }
    Ok(said.over(base))
}

fn from_file(path: &Path) -> Result<Hardware, Problem> {
    let bytes = read(path, "machine's definition", DEFINITION_MAX)?;
    let bad = |why: &str| {
        Problem::usage(format!("{} is not a machine's definition: {why}", path.display()))
            .hint("`lifeboat show POINT --hardware` prints one")
    };
    let value = serde_json::from_slice(&bytes).map_err(|error| bad(&error.to_string()))?;
    Hardware::read(&value).map_err(|why| bad(why.reason()))
}

/// Reads a file of 1 to `most` bytes.
fn read(path: &Path, what: &str, most: usize) -> Result<Vec<u8>, Problem> {
    let cannot = |error: &std::io::Error| {
        Problem::failed(format!("cannot read {what} {}", path.display()), error)
            .hint("check the path and who may read it")
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| cannot(&error))?;
    file.take(most as u64 + 1).read_to_end(&mut bytes).map_err(|error| cannot(&error))?;
    if bytes.is_empty() || bytes.len() > most {
        return Err(Problem::usage(format!("{} cannot hold a {what}: it has 0 or over {most} bytes", path.display())));
    }
    Ok(bytes)
}
