//! `ls` and `find`.

use axum::http::Method;

use super::args::{Find, Global, Ls};
use super::connect::Door;
use super::render;
use crate::catalog::spec::short_id;
use crate::files::answer::{DiskFiles, FileView, Line};
use crate::files::{FindRequest, ListRequest, Place, VersionsRequest};
use crate::problem::{Handling, Kind, Problem};

/// Longest line that is taken.
const LINE_MAX: usize = 1 << 20;

/// What somebody typed where a file may be named.
fn place(from: Option<&String>, spec: &str) -> Place {
    Place { recovery: from.cloned(), spec: spec.to_owned() }
}

/// Whether a place names more than a disk.
fn names_a_volume(place: &Place) -> bool {
    // A time in `MACHINE@TIME` may have two colons of its own.
    let (own, text) = match place.spec.split_once('@') {
        Some((_, text)) if place.recovery.is_none() => (
            text.split(':')
                .take_while(|part| part.as_bytes().first().is_some_and(u8::is_ascii_digit))
                .count()
                .saturating_sub(1),
            text,
        ),
        _ => (0, place.spec.as_str()),
    };
    let colons = text.matches(':').count().saturating_sub(own);
    colons >= if place.recovery.is_some() { 1 } else { 2 }
}

pub async fn ls(door: &Door, global: &Global, args: &Ls) -> Result<(), Problem> {
    if let Some(path) = &args.versions {
        return versions(door, global, args, path).await;
    }
    let place = place(args.from.as_ref(), &args.place);
    if args.path.is_none() && !names_a_volume(&place) {
        let disks: Vec<DiskFiles> = door.client.call(Method::POST, "/api/v1/files/volumes", Some(&place)).await?;
        show_disks(global, &disks);
        return Ok(());
    }
    let request = ListRequest { place, path: args.path.clone() };
    let listing = Listing::read(door, "/api/v1/files/list", &request).await?;
    listing.show(global, |files| {
        let rows: Vec<Vec<String>> = files.iter().map(|file| row(file, &file.path)).collect();
        render::table(&["MODE", "UID", "GID", "SIZE", "MODIFIED (UTC)", "NAME"], &rows, &[1, 2, 3]);
    })
}

pub async fn find(door: &Door, global: &Global, args: &Find) -> Result<(), Problem> {
    let request = FindRequest { place: place(args.from.as_ref(), &args.place), glob: args.glob.clone() };
    let listing = Listing::read(door, "/api/v1/files/find", &request).await?;
    listing.show(global, |files| {
        for file in files {
            render::line(&format!("{}:{}", file.volume.as_deref().unwrap_or_default(), visible(&file.path)));
        }
    })
}

async fn versions(door: &Door, global: &Global, args: &Ls, path: &str) -> Result<(), Problem> {
    let request = VersionsRequest { machine: args.place.clone(), path: path.to_owned() };
    let listing = Listing::read(door, "/api/v1/files/versions", &request).await?;
    if listing.files.is_empty() && listing.problems.is_empty() {
        return Err(Problem::not_found(format!("no recovery point of {} has {path}", args.place)));
    }
    listing.show(global, |files| {
        let rows: Vec<Vec<String>> = files
            .iter()
            .map(|file| {
                vec![
                    short_id(file.point.as_deref().unwrap_or_default()).to_owned(),
                    file.time.map(render::time).unwrap_or_default(),
                    file.volume.clone().unwrap_or_default(),
                    file.size.to_string(),
                    modified(file),
                ]
            })
            .collect();
        render::table(&["POINT", "TIME", "VOLUME", "SIZE", "MODIFIED (UTC)"], &rows, &[3]);
    })
}

fn show_disks(global: &Global, disks: &[DiskFiles]) {
    if global.json {
        render::json(&disks);
        return;
    }
    let mut rows = Vec::new();
    for disk in disks {
        let table = disk.table.clone().unwrap_or_default();
        rows.push(vec![
            disk.disk.clone(),
            String::new(),
            render::bytes(disk.size),
            table,
            String::new(),
            String::new(),
        ]);
        for volume in &disk.volumes {
            rows.push(vec![
                disk.disk.clone(),
                volume.name.clone(),
                render::bytes(volume.size),
                volume.kind.clone(),
                visible(volume.label.as_deref().or(volume.part_label.as_deref()).unwrap_or_default()),
                volume.uuid.clone().unwrap_or_default(),
            ]);
        }
    }
    render::table(&["DISK", "VOLUME", "SIZE", "TYPE", "LABEL", "UUID"], &rows, &[2]);
    for disk in disks {
        for notice in &disk.notices {
            render::note(&format!("{}: {notice}", disk.disk));
        }
    }
}

fn row(file: &FileView, name: &str) -> Vec<String> {
    let arrow = file.target.as_ref().map_or(String::new(), |target| format!(" -> {target}"));
    let name = if name.len() > 1 { name.rsplit('/').next().unwrap_or(name) } else { name };
    vec![
        format!("{}{}", letter(&file.kind), permissions(&file.mode)),
        file.uid.to_string(),
        file.gid.to_string(),
        file.size.to_string(),
        modified(file),
        visible(&format!("{name}{arrow}")),
    ]
}

fn modified(file: &FileView) -> String {
    file.mtime.get(..19).unwrap_or(&file.mtime).replace('T', " ")
}

fn letter(kind: &str) -> char {
    match kind {
        "directory" => 'd',
        "symlink" => 'l',
        "fifo" => 'p',
        "char-device" => 'c',
        "block-device" => 'b',
        "socket" => 's',
        _ => '-',
    }
}

/// `rwxr-xr-x` of an octal mode.
fn permissions(mode: &str) -> String {
    let mode = u32::from_str_radix(mode, 8).unwrap_or(0);
    let mut text = String::new();
    for (shift, special, sign) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (true, true) => sign,
            (true, false) => sign.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// Text without signs that would control the terminal: a foreign disk chooses its names.
pub fn visible(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// What a stream of lines told.
#[derive(Debug, Default)]
struct Listing {
    files: Vec<FileView>,
    problems: Vec<String>,
    notices: Vec<String>,
}

impl Listing {
    async fn read(door: &Door, path: &str, request: &impl serde::Serialize) -> Result<Listing, Problem> {
        let mut download = door.client.download(path, request).await?;
        let mut listing = Listing::default();
        let mut buffer: Vec<u8> = Vec::new();
        let mut whole = false;
        while let Some(bytes) = download.next().await? {
            buffer.extend_from_slice(&bytes);
            let end = buffer.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            if buffer.len() - end > LINE_MAX {
                return Err(Problem::new(Kind::Failed, "the service sent a line without an end"));
            }
            for line in
                buffer.drain(..end).collect::<Vec<u8>>().split(|byte| *byte == b'\n').filter(|line| !line.is_empty())
            {
                match serde_json::from_slice(line)
                    .map_err(|error| Problem::failed("cannot read the listing", &error))?
                {
                    Line::File(file) => listing.files.push(file),
                    Line::Problem(text) => listing.problems.push(text),
                    Line::Notice(text) => listing.notices.push(text),
                    Line::End => whole = true,
                }
            }
        }
        if !whole && listing.problems.is_empty() {
            return Err(
                Problem::new(Kind::Failed, "the listing broke off").hint("ask again; the service may have ended")
            );
        }
        Ok(listing)
    }

    fn show(mut self, global: &Global, show: impl FnOnce(&[FileView])) -> Result<(), Problem> {
        for notice in &self.notices {
            render::note(&visible(notice));
        }
        if global.json {
            render::json(&self.files);
        } else {
            self.files.sort_by(|a, b| (&a.volume, &a.path, b.time).cmp(&(&b.volume, &b.path, a.time)));
            show(&self.files);
        }
        if self.problems.is_empty() {
            return Ok(());
        }
        for problem in &self.problems {
            render::complain(&format!("lifeboat: {}", visible(problem)));
        }
        Err(Problem::new(
            Kind::Failed,
            format!("{} could not be read", render::count(self.problems.len() as u64, "object")),
        )
        .handled(Handling::AnswerTold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_shown_as_ls_shows_them() {
        assert_eq!(permissions("0755"), "rwxr-xr-x");
        assert_eq!(permissions("4644"), "rwSr--r--");
        assert_eq!(permissions("1777"), "rwxrwxrwt");
    }

    #[test]
    fn a_place_with_a_volume_is_known_from_one_without() {
        let names = |spec: &str| names_a_volume(&place(None, spec));
        assert!(
            !names("web01")
                && !names("web01:disk0")
                && !names("web01@2026-11-21T03:00")
                && !names("web01@2026-11-21T03:00:disk0")
        );
        assert!(names("web01:disk0:p1") && names("web01::p1:/x") && names("web01@2026-11-21T03:00:disk0:p1"));
        assert!(names_a_volume(&place(Some(&"web01".to_owned()), "disk0:p1")));
    }
}
