//! The memory that control groups leave to this process: inside a container the host's own figures promise too much.
//!
//! Version 2 and, where memory is under it, version 1. Every group from the process's own up to the mounted root may set a
//! limit, and the tightest counts.

use std::fs;
use std::path::{Path, PathBuf};

/// What control groups leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// The smallest limit.
    pub total: u64,
    /// What could still be used under the tightest, counting as free the file pages that are given back first.
    pub available: u64,
}

/// A limit from here on is none: version 1 says so by a number near 2^63.
const NONE: u64 = 1 << 60;

/// Which files say what.
struct Names {
    limits: &'static [&'static str],
    used: &'static str,
    /// The line of `memory.stat` with the pages that are given back first.
    reclaimable: &'static str,
}

/// Above `high` a group is slowed down until it is below: no room for a guest either.
const V2: Names =
    Names { limits: &["memory.max", "memory.high"], used: "memory.current", reclaimable: "inactive_file" };
const V1: Names =
    Names { limits: &["memory.limit_in_bytes"], used: "memory.usage_in_bytes", reclaimable: "total_inactive_file" };

/// What is left to this process; `root` is `/`, or a test's. `None` without a limit, or where none can be read.
pub fn read(root: &Path) -> Option<Limit> {
    let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).ok()?;
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mut tightest: Option<Limit> = None;
    for (mount, names) in mounts.lines().filter_map(mount) {
        let Some(group) = groups.lines().find_map(|line| path_of(line, names.used == V2.used)) else { continue };
        for folder in folders(&mount, group) {
            let folder = root.join(folder.strip_prefix("/").unwrap_or(&folder));
            if let Some(limit) = of(&folder, &names) {
                let others = tightest.unwrap_or(limit);
                tightest = Some(Limit {
                    total: others.total.min(limit.total),
                    available: others.available.min(limit.available),
                });
            }
        }
    }
    tightest
}

/// Where a hierarchy is mounted, and which of its groups is seen there.
struct Mount {
    group: String,
    point: PathBuf,
}

/// A line of mountinfo, if it is a hierarchy that limits memory.
fn mount(line: &str) -> Option<(Mount, Names)> {
    let (place, kind) = line.split_once(" - ")?;
    let mut place = place.split(' ').skip(3);
    let (group, point) = (place.next()?.to_owned(), PathBuf::from(place.next()?));
    let mut kind = kind.split(' ');
    let names = match (kind.next()?, kind.nth(1)?) {
        ("cgroup2", _) => V2,
        ("cgroup", options) if options.split(',').any(|option| option == "memory") => V1,
        _ => return None,
    };
    Some((Mount { group, point }, names))
}

/// The process's group by a line of `/proc/self/cgroup`, if it is of the version that is asked about.
fn path_of(line: &str, v2: bool) -> Option<&str> {
    let (_, rest) = line.split_once(':')?;
    let (controllers, path) = rest.split_once(':')?;
    let is_it = if v2 { controllers.is_empty() } else { controllers.split(',').any(|one| one == "memory") };
    is_it.then_some(path)
}

/// The folders of a group and of those above it, as far as they are mounted. A group that is not to be seen, for this
/// process is in a namespace of its own, is taken for the one that is mounted.
fn folders(mount: &Mount, group: &str) -> Vec<PathBuf> {
    let inside = Path::new(group).strip_prefix(&mount.group).unwrap_or(Path::new(""));
    let plain = inside.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    let inside = if plain { inside } else { Path::new("") };
    inside.ancestors().map(|inside| mount.point.join(inside)).collect()
}

fn of(folder: &Path, names: &Names) -> Option<Limit> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok(); // `max` is no number
    let total = names.limits.iter().filter_map(|name| number(name)).filter(|limit| *limit < NONE).min()?;
    let reclaimable = read("memory.stat").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix(names.reclaimable)?.strip_prefix(' '));
        line.and_then(|number| number.trim().parse::<u64>().ok())
    });
    let used = number(names.used).unwrap_or(0).saturating_sub(reclaimable.unwrap_or(0));
    Some(Limit { total, available: total.saturating_sub(used) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root with these files.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().expect("in a folder")).expect("made");
            fs::write(path, text).expect("written");
        }
        root
    }

    const MOUNT_V2: &str = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn the_tightest_of_all_groups_up_to_the_mounted_one_counts() {
        let root = root(&[
            ("proc/self/mountinfo", MOUNT_V2),
            ("proc/self/cgroup", "0::/machine/vm\n"),
            ("sys/fs/cgroup/memory.max", "max\n"),
            ("sys/fs/cgroup/machine/memory.max", "4000\n"),
            ("sys/fs/cgroup/machine/memory.high", "max\n"),
            ("sys/fs/cgroup/machine/memory.current", "3500\n"),
            ("sys/fs/cgroup/machine/memory.stat", "anon 2000\ninactive_file 1000\nactive_file 500\n"),
            ("sys/fs/cgroup/machine/vm/memory.max", "max\n"),
            ("sys/fs/cgroup/machine/vm/memory.high", "3000\n"),
            ("sys/fs/cgroup/machine/vm/memory.current", "100\n"),
        ]);
        assert_eq!(read(root.path()), Some(Limit { total: 3000, available: 1500 }));
    }

    #[test]
    fn a_container_sees_its_own_group_as_the_root_of_all() {
        let limited = [
            ("sys/fs/cgroup/memory.max", "1000\n"),
            ("sys/fs/cgroup/memory.high", "max\n"),
            ("sys/fs/cgroup/memory.current", "5000\n"),
        ];
        for (mounted, group) in [("/", "0::/\n"), ("/docker/1", "0::/docker/1\n"), ("/", "0::/../../other\n")] {
            let mount = format!("30 24 0:26 {mounted} /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n");
            let mut files = vec![("proc/self/mountinfo", mount.as_str()), ("proc/self/cgroup", group)];
            files.extend(limited);
            assert_eq!(read(root(&files).path()), Some(Limit { total: 1000, available: 0 }), "{mounted} {group}");
        }
    }

    #[test]
    fn version_one_limits_memory_where_it_has_it_and_no_limit_is_none() {
        let mounts = "33 25 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            34 25 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let groups = "5:memory:/a\n3:cpu:/b\n0::/c\n";
        let none = ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n");
        let common = [("proc/self/mountinfo", mounts), ("proc/self/cgroup", groups)];
        let unlimited = root(&[&common[..], &[none]].concat());
        assert_eq!(read(unlimited.path()), None);
        let limited = root(
            &[
                &common[..],
                &[
                    ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "8000\n"),
                    ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "6000\n"),
                    ("sys/fs/cgroup/memory/a/memory.stat", "inactive_file 1\ntotal_inactive_file 500\n"),
                ],
            ]
            .concat(),
        );
        assert_eq!(read(limited.path()), Some(Limit { total: 8000, available: 2500 }));
        assert_eq!(read(root(&[]).path()), None);
        assert_eq!(read(root(&[("proc/self/mountinfo", "x\n - \n"), ("proc/self/cgroup", "::")]).path()), None);
    }
}
