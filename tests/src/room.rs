//! A file system that is soon full.

use std::path::{Path, PathBuf};

use crate::{skip, tool, tool_output};

/// A file system of its own, in memory, with little room. Unmounted when dropped, also by a failing test.
#[derive(Debug)]
pub struct SmallRoom(PathBuf);

impl SmallRoom {
    /// Mounts one at an empty folder, which is made. Only root can; there is no other way to a full file system of a
    /// known size.
    #[track_caller]
    pub fn new(at: PathBuf, size: &str) -> Option<SmallRoom> {
        let made = std::fs::create_dir_all(&at);
        made.unwrap_or_else(|error| panic!("{}: {error}", at.display()));
        let (options, place) = (format!("size={size}"), at.display().to_string());
        if !tool_output("mount", &["-t", "tmpfs", "-o", &options, "tmpfs", &place]).status.success() {
            skip("cannot mount a small file system without root");
            return None;
        }
        Some(SmallRoom(at))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A file in it, as text.
    pub fn name(&self, file: &str) -> String {
        self.0.join(file).display().to_string()
    }

    /// Gives it another size.
    pub fn resize(&self, size: &str) {
        tool("mount", &["-o", &format!("remount,size={size}"), &self.0.display().to_string()]);
    }
}

impl Drop for SmallRoom {
    fn drop(&mut self) {
        tool_output("umount", &["-l", &self.0.display().to_string()]);
    }
}
