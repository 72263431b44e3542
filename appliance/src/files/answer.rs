//! What the API says of disks, volumes and files.

use images::fs::{FileType, Node};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A disk and what lies on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskFiles {
    /// The disk.
    pub disk: String,
    /// In bytes.
    pub size: u64,
    /// `mbr`, `gpt`, or nothing.
    pub table: Option<String>,
    /// Partitions and logical volumes.
    pub volumes: Vec<VolumeView>,
    /// What is odd about it.
    pub notices: Vec<String>,
}

/// A partition or logical volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VolumeView {
    /// `p1`, `VG/LV` or `whole`.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// What it holds: `ext4`, `ntfs`, `LUKS2`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The file system's label.
    pub label: Option<String>,
    /// The file system's UUID.
    pub uuid: Option<String>,
    /// The partition's name in its table.
    pub part_label: Option<String>,
    /// Why its files cannot be read; absent when they can.
    pub unreadable: Option<String>,
}

/// One line of a listing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// Something that could not be read.
    Problem(String),
    /// Something to know.
    Notice(String),
    /// The listing is complete.
    End,
    /// A file.
    #[serde(untagged)]
    File(FileView),
}

/// A file, directory, or whatever else has a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FileView {
    /// From the root of its volume. Bytes that are no UTF-8 are shown as U+FFFD.
    pub path: String,
    /// `file`, `directory`, `symlink`, `fifo`, `char-device`, `block-device`, `socket`.
    #[serde(rename = "type")]
    pub kind: String,
    /// In bytes.
    pub size: u64,
    /// Permissions, octal.
    pub mode: String,
    /// When its content was changed: RFC 3339, UTC.
    pub mtime: String,
    /// Where a symbolic link points.
    pub target: Option<String>,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names that refer to it.
    pub links: u32,
    /// The recovery point, where several are looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point: Option<String>,
    /// When that point was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<chrono::DateTime<chrono::Utc>>,
    /// The disk and volume, where several are looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
}

impl FileView {
    /// What is shown of `node`.
    pub fn new(path: &[Vec<u8>], node: &Node, target: Option<Vec<u8>>) -> FileView {
        let time = chrono::DateTime::from_timestamp(node.modified.seconds, node.modified.nanoseconds);
        FileView {
            path: show(path),
            kind: kind(node.kind).to_owned(),
            size: node.size,
            mode: format!("{:04o}", node.mode),
            mtime: time.unwrap_or_default().to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true),
            target: target.map(|target| String::from_utf8_lossy(&target).into_owned()),
            uid: node.uid,
            gid: node.gid,
            links: node.links,
            point: None,
            time: None,
            volume: None,
        }
    }
}

/// A path as text.
pub fn show(path: &[Vec<u8>]) -> String {
    if path.is_empty() {
        return "/".to_owned();
    }
    path.iter().map(|name| format!("/{}", String::from_utf8_lossy(name))).collect()
}

fn kind(kind: FileType) -> &'static str {
    match kind {
        FileType::File => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        FileType::Fifo => "fifo",
        FileType::CharDevice => "char-device",
        FileType::BlockDevice => "block-device",
        FileType::Socket => "socket",
    }
}
