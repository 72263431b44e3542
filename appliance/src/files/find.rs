//! Looks for files by name on all disks of a point, and for one file in all points of a machine.

use globset::{GlobBuilder, GlobMatcher};
use images::fs::{Walk, WalkStep, find_path};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use super::answer::{Line, show};
use super::list::{file, from_fs};
use super::place::{self, Within};
use super::source::Disks;
use crate::catalog::PointSummary;
use crate::problem::{Problem, chain};

/// A glob.
pub(super) struct Matcher(GlobMatcher);

impl Matcher {
    pub(super) fn matches(&self, name: &[u8]) -> bool {
        self.0.is_match(OsStr::from_bytes(name))
    }
}

/// A glob in which `*` does not go over slashes; nothing if it is none.
pub(super) fn matcher(glob: &str, ignore_case: bool) -> Option<Matcher> {
    GlobBuilder::new(glob)
        .literal_separator(true)
        .case_insensitive(ignore_case)
        .build()
        .ok()
        .map(|glob| Matcher(glob.compile_matcher()))
}

/// Tells `tell` all files whose name, or whose path if the glob has a slash, matches.
pub fn find(disks: &Disks, within: &Within, glob: &str, tell: &mut dyn FnMut(Line) -> bool) -> Result<(), Problem> {
    let by_path = glob.contains('/');
    let pattern = if by_path && !glob.starts_with('/') { format!("/{glob}") } else { glob.to_owned() };
    if matcher(&pattern, false).is_none() {
        return Err(Problem::usage(format!("`{glob}` is not a glob")).hint("write `*.conf` or `/etc/**/*.conf`"));
    }
    if let Some(notice) = &disks.notice {
        tell(Line::Notice(notice.clone()));
    }
    for layout in place::layouts(disks, within)? {
        for volume in &layout.volumes {
            let asked = within.volume.as_ref().is_none_or(|name| volume.name == *name);
            if !asked || !volume.content.kind.is_readable() {
                continue;
            }
            let name = format!("{}:{}", layout.name, volume.name);
            let fs = match images::fs::open(volume.content.kind, volume.disk.clone()) {
                Ok(fs) => fs,
                Err(error) => {
                    tell(Line::Problem(format!("{name}: {}", chain(&error))));
                    continue;
                }
            };
            for notice in fs.notices() {
                tell(Line::Notice(format!("{name}: {notice}")));
            }
            let Some(matcher) = matcher(&pattern, fs.ignores_case()) else { continue };
            let begin = within.path.as_deref().unwrap_or("/");
            let (top, node) = match find_path(fs.as_ref(), begin.as_bytes()) {
                Ok(found) => found,
                Err(error) if within.volume.is_some() => return Err(from_fs(&name, &error)),
                Err(_) => continue,
            };
            for step in Walk::new(fs.as_ref(), node) {
                let line = match step {
                    WalkStep::Node(below, node) => {
                        let path = [top.as_slice(), &below].concat();
                        let matches = if by_path {
                            matcher.matches(&[b"/".to_vec(), path.join(&b'/')].concat())
                        } else {
                            path.last().is_some_and(|name| matcher.matches(name))
                        };
                        if !matches {
                            continue;
                        }
                        let mut view = file(fs.as_ref(), &path, &node);
                        view.volume = Some(name.clone());
                        Line::File(view)
                    }
                    WalkStep::Problem(below, error) => {
                        let path = [top.as_slice(), &below].concat();
                        Line::Problem(format!("{name}:{}: {}", show(&path), chain(&error)))
                    }
                };
                if !tell(line) {
                    return Ok(());
                }
            }
        }
    }
    tell(Line::End);
    Ok(())
}

/// Tells `tell` of the file at a place in each of these points, newest first. A point that does not have it is passed over.
pub fn versions(
    points: &[Arc<PointSummary>],
    open: &dyn Fn(&PointSummary) -> Result<Disks, Problem>,
    within: &Within,
    tell: &mut dyn FnMut(Line) -> bool,
) -> Result<(), Problem> {
    let path = within.path.as_deref().unwrap_or("/");
    for point in points.iter().rev() {
        let found = open(point).and_then(|disks| {
            let mut found = Vec::new();
            for layout in place::layouts(&disks, within)? {
                for volume in &layout.volumes {
                    let asked = within.volume.as_ref().is_none_or(|name| volume.name == *name);
                    if !asked || !volume.content.kind.is_readable() {
                        continue;
                    }
                    let name = format!("{}:{}", layout.name, volume.name);
                    let Ok(fs) = images::fs::open(volume.content.kind, volume.disk.clone()) else { continue };
                    if let Ok((names, node)) = find_path(fs.as_ref(), path.as_bytes()) {
                        let mut view = file(fs.as_ref(), &names, &node);
                        view.volume = Some(name);
                        view.point = Some(point.id.clone());
                        view.time = Some(point.time);
                        found.push(view);
                    }
                }
            }
            Ok(found)
        });
        let lines = match found {
            Ok(found) => found.into_iter().map(Line::File).collect(),
            Err(problem) => vec![Line::Problem(format!(
                "point {}: {}",
                crate::catalog::spec::short_id(&point.id),
                problem.to_string().replace('\n', "; ")
            ))],
        };
        for line in lines {
            if !tell(line) {
                return Ok(());
            }
        }
    }
    tell(Line::End);
    Ok(())
}
