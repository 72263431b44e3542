//! `POINT[:DISK[:VOLUME[:PATH]]]`.

use images::fs::FileSystem;
use images::volume::{DiskLayout, Volume};

use super::source::Disks;
use crate::problem::Problem;

/// A place without the recovery point.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Within {
    /// The disk.
    pub disk: Option<String>,
    /// The volume.
    pub volume: Option<String>,
    /// The path in its file system.
    pub path: Option<String>,
}

impl Within {
    /// From `DISK[:VOLUME[:PATH]]`; a path may have colons of its own.
    pub fn parse(text: &str) -> Within {
        let mut parts = text.splitn(3, ':').map(|part| (!part.is_empty()).then(|| part.to_owned()));
        Within { disk: parts.next().flatten(), volume: parts.next().flatten(), path: parts.next().flatten() }
    }
}

/// Takes a place apart. A time in `MACHINE@TIME` has colons as the place has, so whichever longest beginning `resolve`
/// knows is the point; if it knows none, its complaint about the shortest is returned.
pub fn split<T>(spec: &str, resolve: impl Fn(&str) -> Result<T, Problem>) -> Result<(T, Within), Problem> {
    let point = spec.split(':').next().unwrap_or_default();
    // Only a time makes a beginning with colons possible, and only the first two of them can be its own.
    if point.contains('@') {
        let colons: Vec<usize> = spec.match_indices(':').map(|(at, _)| at).take(4).chain([spec.len()]).collect();
        for end in colons.into_iter().rev() {
            if let Ok(found) = resolve(&spec[..end]) {
                return Ok((found, Within::parse(spec.get(end + 1..).unwrap_or_default())));
            }
        }
    }
    let rest = spec.get(point.len() + 1..).unwrap_or_default();
    Ok((resolve(point)?, Within::parse(rest)))
}

/// An open file system.
pub struct Opened {
    /// The disk.
    pub disk: String,
    /// The volume.
    pub volume: String,
    /// Its files.
    pub fs: Box<dyn FileSystem>,
}

impl Opened {
    fn new(layout: &DiskLayout, volume: &Volume) -> Result<Opened, Problem> {
        let fs = images::fs::open(volume.content.kind, volume.disk.clone()).map_err(|error| {
            Problem::failed(format!("cannot open {}:{}, {}", layout.name, volume.name, volume.content.name), &error)
        })?;
        Ok(Opened { disk: layout.name.clone(), volume: volume.name.clone(), fs })
    }
}

/// The disks that a place may mean.
pub fn layouts<'a>(disks: &'a Disks, within: &Within) -> Result<Vec<&'a DiskLayout>, Problem> {
    let Some(name) = &within.disk else { return Ok(disks.layouts.iter().collect()) };
    match disks.layouts.iter().find(|layout| layout.name == *name) {
        Some(layout) => Ok(vec![layout]),
        None => {
            let names: Vec<&str> = disks.layouts.iter().map(|layout| layout.name.as_str()).collect();
            Err(Problem::not_found(format!("{} has no disk `{name}`", disks.of))
                .hint(format!("it has {}", names.join(", "))))
        }
    }
}

/// Opens the file system that a place means. Without a volume it is the only one that can be read.
pub fn open(disks: &Disks, within: &Within) -> Result<Opened, Problem> {
    let layouts = layouts(disks, within)?;
    let volumes = || layouts.iter().flat_map(|layout| layout.volumes.iter().map(move |volume| (*layout, volume)));
    let choices = || {
        let names: Vec<String> = volumes()
            .filter(|(_, volume)| volume.content.kind.is_readable())
            .map(|(layout, volume)| format!("{}:{} ({})", layout.name, volume.name, volume.content.name))
            .collect();
        if names.is_empty() {
            "none of its volumes can be read".to_owned()
        } else {
            format!("it has {}", names.join(", "))
        }
    };
    let shown = within.disk.as_deref().unwrap_or(&disks.of);
    if let Some(name) = &within.volume {
        let (layout, volume) = volumes()
            .find(|(_, volume)| volume.name == *name)
            .ok_or_else(|| Problem::not_found(format!("{shown} has no volume `{name}`")).hint(choices()))?;
        if !volume.content.kind.is_readable() {
            return Err(Problem::refused(format!(
                "the files of {}:{name} cannot be read: {} ({})",
                layout.name,
                volume.content.kind.why_not(),
                volume.content.name
            ))
            .hint(choices()));
        }
        return Opened::new(layout, volume);
    }
    let mut readable = volumes().filter(|(_, volume)| volume.content.kind.is_readable());
    match (readable.next(), readable.next()) {
        (Some((layout, volume)), None) => Opened::new(layout, volume),
        (None, _) => Err(Problem::not_found(format!("{shown} has no file system that can be read"))
            .hint("`lifeboat ls POINT` shows what its disks hold")),
        (Some(_), Some(_)) => {
            Err(Problem::usage(format!("{shown} has several file systems")).hint(format!("name one: {}", choices())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_keeps_its_colons() {
        let known = |spec: &str| match spec {
            "web01" | "web01~1" | "web01@2026-11-21T03" | "web01@2026-11-21T03:00" => Ok(spec.to_owned()),
            other => Err(Problem::not_found(other)),
        };
        let within = |disk: &str, volume: &str, path: &str| {
            let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            Within { disk: some(disk), volume: some(volume), path: some(path) }
        };
        for (spec, point, rest) in [
            ("web01", "web01", within("", "", "")),
            ("web01:disk0:p1:/a:b", "web01", within("disk0", "p1", "/a:b")),
            ("web01~1:disk0:vg/root", "web01~1", within("disk0", "vg/root", "")),
            ("web01@2026-11-21T03:00:disk0:p1:/x", "web01@2026-11-21T03:00", within("disk0", "p1", "/x")),
            ("web01@2026-11-21T03:disk0", "web01@2026-11-21T03", within("disk0", "", "")),
            ("web01@2026-11-21T03:00", "web01@2026-11-21T03:00", within("", "", "")),
        ] {
            assert_eq!(split(spec, known).unwrap(), (point.to_owned(), rest), "{spec}");
        }
        assert!(split("db01:disk0", known).unwrap_err().title.contains("db01"));
    }
}
