//! Writes what a copy sends to a folder of this machine.
//!
//! Names and links come from a foreign disk. Every path is resolved by the kernel below the destination's own
//! descriptor and through no link (`openat2` with `RESOLVE_BENEATH` and `RESOLVE_NO_SYMLINKS`), so nothing is ever
//! written anywhere else. A file gets its name when it is complete: until then it is `.lifeboat-...` beside it.

mod place;
mod stream;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use rustix::fs::{AtFlags, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use tokio::sync::mpsc;

pub use place::{Existing, Target};

use self::place::Parent;
use self::stream::{Content, Member, Stream};
use crate::files::Remark;

/// What became of a copy.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Objects that were written.
    pub files: u64,
    /// Bytes of file content written.
    pub bytes: u64,
    /// Files that existed and were kept.
    pub kept: Vec<String>,
    /// What could not be copied, and why.
    pub problems: Vec<String>,
    /// What is to be known.
    pub notices: Vec<String>,
}

/// Writes the stream that arrives at `receiver`.
pub fn extract(receiver: mpsc::Receiver<Bytes>, target: &Target, existing: Existing) -> io::Result<Outcome> {
    let mut stream = Stream::new(Pieces { receiver, current: Bytes::new() });
    let mut work = Extract {
        target,
        existing,
        owner: rustix::process::geteuid().is_root(),
        outcome: Outcome::default(),
        told_of_acls: false,
        folders: Vec::new(),
        last: None,
        whole: false,
    };
    while let Some(member) = stream.next()? {
        work.member(member, &mut stream)?;
    }
    work.finish_folders();
    if !work.whole {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the stream ended before it was complete"));
    }
    Ok(work.outcome)
}

/// The stream as something to read.
struct Pieces {
    receiver: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receiver.blocking_recv() {
                Some(bytes) => self.current = bytes,
                None => return Ok(0),
            }
        }
        let length = buf.len().min(self.current.len());
        let part = self.current.split_to(length);
        if let Some(buf) = buf.get_mut(..length) {
            buf.copy_from_slice(&part);
        }
        Ok(length)
    }
}

/// A finished file that gets its name with the next member: a remark may say that it is cut off.
struct Waiting {
    parent: Parent,
    temporary: String,
    bytes: u64,
}

struct Extract<'a> {
    target: &'a Target,
    existing: Existing,
    owner: bool,
    outcome: Outcome,
    told_of_acls: bool,
    folders: Vec<(Vec<u8>, Member)>,
    last: Option<Waiting>,
    whole: bool,
}

impl Extract<'_> {
    fn member(&mut self, member: Member, stream: &mut Stream<Pieces>) -> io::Result<()> {
        if let Content::Remark(text) = &member.content {
            return self.remark(text);
        }
        self.settle();
        let shown = String::from_utf8_lossy(&member.path).into_owned();
        match self.write(member, stream) {
            Ok(()) => Ok(()),
            Err(Failure::Here(error)) => {
                self.outcome.problems.push(format!("{shown}: {error}"));
                Ok(())
            }
            Err(Failure::Stream(error)) => {
                self.drop_last();
                Err(error)
            }
        }
    }

    fn remark(&mut self, text: &str) -> io::Result<()> {
        match serde_json::from_str(text).map_err(io::Error::other)? {
            Remark::Notice(text) => self.outcome.notices.push(text),
            Remark::End => {
                self.settle();
                self.whole = true;
            }
            Remark::Problem { path, text, cut } => {
                if cut {
                    self.drop_last();
                }
                self.outcome.problems.push(format!("{path}: {text}"));
            }
        }
        Ok(())
    }

    /// The file that came last is complete.
    fn settle(&mut self) {
        let Some(Waiting { parent, temporary, bytes }) = self.last.take() else { return };
        match parent.rename(&temporary, self.existing) {
            Ok(()) => {
                self.outcome.files += 1;
                self.outcome.bytes += bytes;
            }
            Err(error) => {
                parent.remove(&temporary);
                if error.kind() == io::ErrorKind::AlreadyExists {
                    self.outcome.kept.push(parent.shown());
                } else {
                    self.outcome.problems.push(format!("{}: {error}", parent.shown()));
                }
            }
        }
    }

    fn drop_last(&mut self) {
        if let Some(last) = self.last.take() {
            last.parent.remove(&last.temporary);
        }
    }

    fn write(&mut self, member: Member, stream: &mut Stream<Pieces>) -> Result<(), Failure> {
        let parent = self.target.parent(&member.path)?;
        let keep = self.existing == Existing::Keep;
        if !matches!(member.content, Content::Folder) && keep && parent.exists()? {
            self.outcome.kept.push(parent.shown());
            return Ok(());
        }
        match &member.content {
            Content::Folder => return self.folder(&parent, member).map_err(Failure::Here),
            Content::File { .. } => return self.file(parent, &member, stream),
            Content::HardLink(first) => {
                let first = self.target.parent(first)?;
                parent.clear(self.existing)?;
                parent.link(&first)?;
                self.outcome.files += 1;
                return Ok(());
            }
            Content::Symlink(target) => {
                parent.clear(self.existing)?;
                parent.symlink(target)?;
            }
            Content::Special(kind, _) if !self.owner && *kind != FileType::Fifo => {
                return Err(Failure::Here(io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    "only root can make devices",
                )));
            }
            Content::Special(kind, device) => {
                parent.clear(self.existing)?;
                parent.special(*kind, *device)?;
            }
            Content::Remark(_) => return Ok(()),
        }
        self.outcome.files += 1;
        self.attributes_by_name(&parent, &member).map_err(Failure::Here)
    }

    /// An existing folder is kept as it is, and filled.
    fn folder(&mut self, parent: &Parent, member: Member) -> io::Result<()> {
        if parent.folder()? {
            self.outcome.files += 1;
            self.folders.push((member.path.clone(), member));
        }
        Ok(())
    }

    fn file(&mut self, parent: Parent, member: &Member, stream: &mut Stream<Pieces>) -> Result<(), Failure> {
        let Content::File { size } = member.content else { return Ok(()) };
        let (file, temporary) = parent.temporary()?;
        let written = self.fill(&file, size, member, stream);
        match written {
            Ok(bytes) => {
                self.last = Some(Waiting { parent, temporary, bytes });
                Ok(())
            }
            Err(error) => {
                parent.remove(&temporary);
                Err(error)
            }
        }
    }

    fn fill(&mut self, file: &File, size: u64, member: &Member, stream: &mut Stream<Pieces>) -> Result<u64, Failure> {
        let mut bytes = 0;
        while let Some((offset, piece)) = stream.content().map_err(Failure::Stream)? {
            file.write_all_at(piece, offset).map_err(Failure::Here)?;
            bytes += piece.len() as u64;
        }
        file.set_len(size).map_err(Failure::Here)?;
        self.attributes(file, member).map_err(Failure::Here)?;
        Ok(bytes)
    }

    /// Owner first: changing it takes special bits away. Times last: everything else changes them.
    fn attributes(&mut self, file: &File, member: &Member) -> io::Result<()> {
        if self.owner {
            rustix::fs::fchown(file, Some(Uid::from_raw(member.uid)), Some(Gid::from_raw(member.gid)))?;
        }
        rustix::fs::fchmod(file, self.mode(member))?;
        let mut refused = None;
        for (name, value) in &member.xattrs {
            if let Err(error) = rustix::fs::fsetxattr(file, name.as_slice(), value, XattrFlags::empty()) {
                refused.get_or_insert((name, error));
            }
        }
        rustix::fs::futimens(file, &times(member))?;
        self.refused(member, refused);
        Ok(())
    }

    fn attributes_by_name(&mut self, parent: &Parent, member: &Member) -> io::Result<()> {
        let (dir, name) = parent.at();
        if self.owner {
            let (uid, gid) = (Some(Uid::from_raw(member.uid)), Some(Gid::from_raw(member.gid)));
            rustix::fs::chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if matches!(member.content, Content::Special(..)) {
            rustix::fs::chmodat(dir, name, self.mode(member), AtFlags::empty())?;
        }
        rustix::fs::utimensat(dir, name, &times(member), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }

    /// What only the owner may have: without him a file would run with the rights of who copied it.
    fn mode(&self, member: &Member) -> Mode {
        let mode = if self.owner { member.mode & 0o7777 } else { member.mode & 0o1777 };
        Mode::from_raw_mode(mode)
    }

    fn refused(&mut self, member: &Member, refused: Option<(&Vec<u8>, Errno)>) {
        let Some((name, error)) = refused else { return };
        // Every file of an NTFS has it, and only a driver of NTFS takes it.
        if name == b"system.ntfs_acl" {
            if !std::mem::replace(&mut self.told_of_acls, true) {
                let text =
                    format!("owners and access rights of Windows are left out: {error}; a tar stream keeps them");
                self.outcome.notices.push(text);
            }
            return;
        }
        let text = format!(
            "{}: its extended attribute {} is left out: {error}",
            String::from_utf8_lossy(&member.path),
            String::from_utf8_lossy(name)
        );
        // Attributes of the system are root's to set, and many file systems have none.
        if name.starts_with(b"user.") && error != Errno::OPNOTSUPP {
            self.outcome.problems.push(text);
        } else if self.outcome.notices.len() < 20 {
            self.outcome.notices.push(text);
        }
    }

    /// Folders get their attributes last, the innermost first: what is written into one changes its times, and its mode
    /// may forbid it.
    fn finish_folders(&mut self) {
        self.settle();
        for (path, member) in std::mem::take(&mut self.folders).into_iter().rev() {
            let done = self.target.open_folder(&path).and_then(|folder| self.attributes(&folder, &member));
            if let Err(error) = done {
                self.outcome.problems.push(format!("{}: {error}", String::from_utf8_lossy(&path)));
            }
        }
    }
}

/// Whether the copy can go on.
enum Failure {
    /// With the next object.
    Here(io::Error),
    /// Not at all.
    Stream(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Here(error)
    }
}

fn times(member: &Member) -> Timestamps {
    let spec = |(seconds, nanoseconds): (i64, u32)| Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    Timestamps { last_access: spec(member.atime.unwrap_or(member.mtime)), last_modification: spec(member.mtime) }
}
