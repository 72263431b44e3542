//! Folders of this machine that show the files of disks, each for as long as somebody holds it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use images::mount::{Content, Mounted, mount};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Disks, Place};
use crate::problem::Problem;

/// What to mount, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MountRequest {
    /// A recovery point or a recovery.
    #[serde(flatten)]
    pub place: Place,
    /// The folder.
    pub dir: PathBuf,
}

/// The mounts of this process.
#[derive(Debug, Default)]
pub struct Mounts {
    next: AtomicU64,
    running: Mutex<BTreeMap<u64, (PathBuf, Mounted)>>,
}

/// A folder is mounted until this is dropped.
#[derive(Debug)]
pub struct MountHold {
    mounts: Arc<Mounts>,
    id: u64,
    /// The folder.
    pub dir: PathBuf,
}

impl MountHold {
    /// Whether somebody else has unmounted it.
    pub fn has_ended(&self) -> bool {
        self.mounts.lock().get(&self.id).is_none_or(|(_, mounted)| mounted.has_ended())
    }
}

impl Drop for MountHold {
    fn drop(&mut self) {
        let mounted = self.mounts.lock().remove(&self.id);
        drop(mounted);
    }
}

impl Mounts {
    /// Mounts the disks on a folder.
    pub fn start(self: &Arc<Self>, disks: Disks, dir: &std::path::Path) -> Result<MountHold, Problem> {
        let title = || format!("cannot mount the files of {} on {}", disks.of, dir.display());
        if !dir.is_dir() {
            return Err(Problem::not_found(title()).hint("name a folder that exists"));
        }
        let content = if disks.notice.is_some() { Content::Live } else { Content::Fixed };
        let name = disks.of.clone();
        let failed = title();
        let mounted = mount(dir, &format!("lifeboat {name}"), disks.layouts, content).map_err(|error| {
            Problem::failed(failed, &error)
                .hint("FUSE has to be there (/dev/fuse), and without root fusermount3 of the package fuse3")
        })?;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(id, (dir.to_owned(), mounted));
        Ok(MountHold { mounts: self.clone(), id, dir: dir.to_owned() })
    }

    /// The folders that are mounted.
    pub fn list(&self) -> Vec<PathBuf> {
        self.lock().values().filter(|(_, mounted)| !mounted.has_ended()).map(|(dir, _)| dir.clone()).collect()
    }

    /// Unmounts all.
    pub fn close(&self) {
        let all = std::mem::take(&mut *self.lock());
        drop(all);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, (PathBuf, Mounted)>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
