//! Listings: the disks with their volumes, and the entries of a directory.

use images::fs::{FileSystem, FileType, FsError, Node, find_path};
use images::volume::{DiskLayout, Kind};

use super::answer::{DiskFiles, FileView, Line, VolumeView};
use super::place::{self, Within};
use super::source::Disks;
use crate::problem::{Kind as ProblemKind, Problem};

/// The disks that a place means, and what lies on them.
pub fn volumes(disks: &Disks, within: &Within) -> Result<Vec<DiskFiles>, Problem> {
    Ok(place::layouts(disks, within)?.into_iter().map(view).collect())
}

fn view(layout: &DiskLayout) -> DiskFiles {
    let volumes = layout.volumes.iter().map(|volume| VolumeView {
        name: volume.name.clone(),
        size: volume.size,
        kind: match volume.content.kind {
            Kind::Empty => "empty".to_owned(),
            _ => volume.content.name.clone(),
        },
        label: volume.content.label.clone(),
        uuid: volume.content.uuid.clone(),
        part_label: volume.part_label.clone(),
        unreadable: (!volume.content.kind.is_readable()).then(|| volume.content.kind.why_not().to_owned()),
    });
    DiskFiles {
        disk: layout.name.clone(),
        size: layout.size,
        table: layout.table.map(|table| table.to_string()),
        volumes: volumes.collect(),
        notices: layout.notices.clone(),
    }
}

/// Tells `tell` all entries of the directory at the place, or the file itself; it returns false when nobody listens any
/// more.
pub fn list(disks: &Disks, within: &Within, tell: &mut dyn FnMut(Line) -> bool) -> Result<(), Problem> {
    let opened = place::open(disks, within)?;
    let fs = opened.fs.as_ref();
    let path = within.path.as_deref().unwrap_or("/");
    let (names, mut node) = find_path(fs, path.as_bytes()).map_err(|error| from_fs(&opened.volume, &error))?;
    for notice in disks.notice.clone().into_iter().chain(fs.notices()) {
        tell(Line::Notice(notice));
    }
    // A link to a directory is shown as what it points to when its path says so with a slash.
    if node.kind == FileType::Symlink && path.ends_with('/') {
        node = find_path(fs, format!("{path}.").as_bytes()).map_err(|error| from_fs(&opened.volume, &error))?.1;
    }
    if node.kind != FileType::Directory {
        tell(Line::File(file(fs, &names, &node)));
        tell(Line::End);
        return Ok(());
    }
    let mut cursor = 0;
    loop {
        let entries = fs.read_dir(node.id, cursor).map_err(|error| from_fs(path, &error))?;
        match entries.last() {
            Some(last) if last.next > cursor => cursor = last.next,
            _ => break,
        }
        for entry in entries {
            let path = [names.as_slice(), &[entry.name]].concat();
            let line = match fs.node(entry.id) {
                Ok(node) => Line::File(file(fs, &path, &node)),
                Err(error) => {
                    Line::Problem(format!("{}: {}", super::answer::show(&path), crate::problem::chain(&error)))
                }
            };
            if !tell(line) {
                return Ok(());
            }
        }
    }
    tell(Line::End);
    Ok(())
}

/// A file with the target of a link.
pub(super) fn file(fs: &dyn FileSystem, path: &[Vec<u8>], node: &Node) -> FileView {
    let target = if node.kind == FileType::Symlink { fs.read_link(node.id).ok() } else { None };
    FileView::new(path, node, target)
}

/// A problem with a file system.
pub(super) fn from_fs(what: &str, error: &FsError) -> Problem {
    let kind = match error {
        FsError::NotFound { .. } | FsError::NotADirectory { .. } => ProblemKind::NotFound,
        FsError::Damaged { .. } | FsError::Unsupported { .. } | FsError::Loop { .. } | FsError::Io { .. } => {
            ProblemKind::Failed
        }
    };
    Problem::because(kind, format!("cannot read {what}"), error)
}
