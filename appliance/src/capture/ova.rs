//! Disks of an OVA: a tar file that holds an OVF description and the disk images it names.
//! Sources: DMTF DSP0243 (OVF 2.1), sections 5.3 and 9.1; VMware's "Virtual Disk Format 5.0" for the sparse header.
//!
//! An OVA comes from elsewhere. Its images are opened as the slices of the file that they are, and none of them may lead
//! QEMU to another file: a sparse image that keeps its extents elsewhere is refused, and a parent is not looked for.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Seek};
use std::os::unix::fs::FileExt;
use std::path::Path;

use blockstore::Source;
use roxmltree::{Document, Node};
use serde_json::json;

use crate::problem::Problem;
use crate::qemu_nbd;

/// Longest description that is read.
const DESCRIPTION_MAX: u64 = 4 << 20;
/// Longest name or extended header that is read.
const EXTENSION_MAX: u64 = 64 << 10;
/// Most files in an OVA.
const MEMBERS_MAX: usize = 4096;
/// First bytes of a sparse VMDK.
const SPARSE_MAGIC: [u8; 4] = *b"KDMV";

/// Whether a file's name says that it is an OVA.
pub fn is_ova(location: &str) -> bool {
    Path::new(location).extension().is_some_and(|ending| ending.eq_ignore_ascii_case("ova"))
}

/// The images of the disks of the OVA at `path`, in the order of its description.
pub fn images(path: &Path) -> Result<Vec<Member>, Problem> {
    let title = || format!("cannot back up the disks of {}", path.display());
    let file = File::open(path).map_err(|error| Problem::failed(title(), &error))?;
    disks(&file).map_err(|error| match error {
        OvaError::Io(error) => Problem::failed(title(), &error),
        OvaError::Refused(reason) => Problem::usage(format!("{}: {reason}", title())),
    })
}

/// Opens the disks of the OVA at `path`, in the order of its description.
pub fn open(path: &Path) -> Result<Vec<Box<dyn Source>>, Problem> {
    let disks = images(path)?;
    let mut sources: Vec<Box<dyn Source>> = Vec::with_capacity(disks.len());
    for disk in disks {
        // QEMU's words: a slice of the file, without the parent that the image may name.
        let graph = json!({
            "driver": "vmdk",
            "backing": null,
            "file": {
                "driver": "raw", "offset": disk.offset, "size": disk.size,
                "file": { "driver": "file", "filename": path.to_string_lossy() },
            },
        });
        let source = qemu_nbd::open_graph("vmdk", &graph)
            .map_err(|error| Problem::failed(format!("cannot back up {} of {}", disk.name, path.display()), &error))?;
        sources.push(Box::new(source));
    }
    Ok(sources)
}

#[derive(Debug)]
enum OvaError {
    Io(io::Error),
    Refused(String),
}

impl From<io::Error> for OvaError {
    fn from(error: io::Error) -> OvaError {
        OvaError::Io(error)
    }
}

fn refuse<T>(reason: impl Into<String>) -> Result<T, OvaError> {
    Err(OvaError::Refused(reason.into()))
}

/// A file inside the OVA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Where it begins in the OVA.
    pub offset: u64,
    /// In bytes.
    pub size: u64,
}

fn disks(file: &File) -> Result<Vec<Member>, OvaError> {
    let members = members(file)?;
    let Some(description) = members.values().find(|member| member.name.to_ascii_lowercase().ends_with(".ovf")) else {
        return refuse("it holds no .ovf file");
    };
    if description.size > DESCRIPTION_MAX {
        return refuse(format!("its description has {} bytes", description.size));
    }
    let mut text = vec![0; usize::try_from(description.size).unwrap_or(0)];
    file.read_exact_at(&mut text, description.offset)?;
    let Ok(text) = String::from_utf8(text) else { return refuse("its description is not UTF-8") };
    let mut disks = Vec::new();
    for name in disk_files(&text).map_err(OvaError::Refused)? {
        let Some(member) = members.get(&name) else { return refuse(format!("{name} is missing")) };
        check_image(file, member)?;
        disks.push(member.clone());
    }
    Ok(disks)
}

/// Refuses what the tar library would read into memory whole: long names and extended headers of any length.
fn check_headers(file: &File) -> Result<(), OvaError> {
    let mut archive = tar::Archive::new(file);
    for (number, entry) in archive.entries_with_seek()?.raw(true).enumerate() {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => return refuse(format!("it is not a whole tar file: {error}")),
        };
        let kind = entry.header().entry_type();
        let plain = kind.is_file() || kind.is_dir() || kind.is_symlink() || kind.is_hard_link();
        if !plain && entry.size() > EXTENSION_MAX {
            return refuse(format!("it has an entry of {} bytes that is not a file", entry.size()));
        }
        if number >= MEMBERS_MAX * 2 {
            return refuse(format!("it holds more than {MEMBERS_MAX} files"));
        }
    }
    Ok(())
}

/// All regular files, by name.
fn members(file: &File) -> Result<HashMap<String, Member>, OvaError> {
    let length = file.metadata()?.len();
    check_headers(file)?;
    let mut file = file;
    file.rewind()?;
    let mut archive = tar::Archive::new(file);
    let mut members = HashMap::new();
    let entries = archive.entries_with_seek()?;
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => return refuse(format!("it is not a whole tar file: {error}")),
        };
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let Ok(name) = String::from_utf8(entry.path_bytes().into_owned()) else {
            return refuse("a file in it has a name that is not UTF-8");
        };
        let (offset, size) = (entry.raw_file_position(), entry.size());
        if offset.checked_add(size).is_none_or(|end| end > length) {
            return refuse(format!("{name} reaches past its end: the file is cut off"));
        }
        if members.len() == MEMBERS_MAX {
            return refuse(format!("it holds more than {MEMBERS_MAX} files"));
        }
        members.insert(name.clone(), Member { name, offset, size });
    }
    Ok(members)
}

/// The files of the disks, in the order of the description's disk section.
fn disk_files(description: &str) -> Result<Vec<String>, String> {
    let document = Document::parse(description).map_err(|error| format!("its description is not XML: {error}"))?;
    let elements = |name: &'static str| document.descendants().filter(move |node| node.is_named(name));
    let mut files = HashMap::new();
    for file in elements("File") {
        if let (Some(id), Some(href)) = (file.value_of("id"), file.value_of("href")) {
            let packed = file.value_of("compression").is_some_and(|how| how != "identity");
            let parts = file.value_of("chunkSize").is_some();
            files.insert(id, (href, packed || parts));
        }
    }
    let mut names = Vec::new();
    for disk in elements("Disk") {
        let id = disk.value_of("diskId").unwrap_or("without a name");
        // A disk without a file begins empty, and there is nothing to back up.
        let Some(reference) = disk.value_of("fileRef") else { continue };
        if disk.value_of("parentRef").is_some() {
            return Err(format!("disk {id} builds on another one"));
        }
        match files.get(reference) {
            Some((href, false)) => names.push((*href).to_owned()),
            Some((href, true)) => return Err(format!("{href} is compressed or cut into parts; unpack it with tar")),
            None => return Err(format!("disk {id} is in a file that is not listed")),
        }
    }
    if names.is_empty() { Err("its description names no disk".to_owned()) } else { Ok(names) }
}

/// Refuses what is not a sparse VMDK that holds its data itself.
fn check_image(file: &File, member: &Member) -> Result<(), OvaError> {
    let mut head = [0_u8; 20];
    if file.read_at(&mut head, member.offset)? < head.len() || member.size < 512 || !head.starts_with(&SPARSE_MAGIC) {
        return refuse(format!("{} is not a sparse VMDK; unpack it with tar and back it up by itself", member.name));
    }
    // Capacity 0 stands for a descriptor that names the files with the data.
    if head[12..20] == [0; 8] {
        return refuse(format!("{} keeps its data in other files", member.name));
    }
    Ok(())
}

/// Elements and attributes by their local name: the namespace has its version in it.
trait Local<'a> {
    fn is_named(&self, name: &str) -> bool;
    fn value_of(&self, name: &str) -> Option<&'a str>;
}

impl<'a> Local<'a> for Node<'a, '_> {
    fn is_named(&self, name: &str) -> bool {
        self.is_element() && self.tag_name().name() == name
    }

    fn value_of(&self, name: &str) -> Option<&'a str> {
        self.attributes().find(|attribute| attribute.name() == name).map(|attribute| attribute.value())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description(references: &str, disks: &str) -> String {
        format!(
            "<?xml version='1.0'?><Envelope xmlns='http://schemas.dmtf.org/ovf/envelope/1' \
             xmlns:ovf='http://schemas.dmtf.org/ovf/envelope/1'><References>{references}</References>\
             <DiskSection><Info/>{disks}</DiskSection></Envelope>"
        )
    }

    #[test]
    fn disks_are_found_in_the_order_of_the_description() {
        let files =
            "<File ovf:href='b.vmdk' ovf:id='f2'/><File ovf:href='a.vmdk' ovf:id='f1' ovf:compression='identity'/>";
        let disks =
            "<Disk ovf:diskId='d1' ovf:fileRef='f1'/><Disk ovf:diskId='e'/><Disk ovf:diskId='d2' ovf:fileRef='f2'/>";
        assert_eq!(disk_files(&description(files, disks)).unwrap(), ["a.vmdk", "b.vmdk"]);
    }

    #[test]
    fn descriptions_that_name_no_whole_disk_are_refused() {
        let file = "<File ovf:href='a.vmdk' ovf:id='f'/>";
        let packed = "<File ovf:href='a.vmdk' ovf:id='f' ovf:compression='gzip'/>";
        let disk = "<Disk ovf:diskId='d' ovf:fileRef='f'/>";
        let child = "<Disk ovf:diskId='d' ovf:fileRef='f' ovf:parentRef='x'/>";
        for (references, disks) in [(file, ""), ("", disk), (packed, disk), (file, child)] {
            disk_files(&description(references, disks)).unwrap_err();
        }
        disk_files("no XML").unwrap_err();
    }

    #[test]
    fn a_name_of_megabytes_is_refused_unread() {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(1 << 20);
        header.set_cksum();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(header.as_bytes(), 0).unwrap();
        file.set_len(512 + (1 << 20) + 1024).unwrap();
        match members(&file) {
            Err(OvaError::Refused(why)) => assert!(why.contains("1048576"), "{why}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_image_that_leads_elsewhere_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let mut image = vec![0; 1024];
        image[..4].copy_from_slice(&SPARSE_MAGIC);
        file.write_all_at(&image, 0).unwrap();
        let member = Member { name: "a.vmdk".into(), offset: 0, size: 1024 };
        assert!(matches!(check_image(&file, &member), Err(OvaError::Refused(_))));
        file.write_all_at(&[1], 12).unwrap();
        check_image(&file, &member).unwrap();
        file.write_all_at(b"# Disk DescriptorFile", 0).unwrap();
        assert!(matches!(check_image(&file, &member), Err(OvaError::Refused(_))));
    }
}
