//! What stands at the beginning: configuration, key slots, index runs, recovery points.

use std::io;

use super::{Damage, Verifier, VerifyError};
use crate::error::ReadError;
use crate::format::FormatError;
use crate::id::RunId;
use crate::index::SetAside;
use crate::repository::open::{OpenError, read_config, read_slot};
use crate::repository::protect::{PointError, Protected, damaged_protection, read_protection};
use crate::storage::{Object, ObjectKind};

impl Verifier<'_> {
    /// Configuration and key slots.
    pub(super) fn check_head(&mut self) -> Result<(), VerifyError> {
        let storage = self.repository.storage();
        let config = self.repository.fetcher().config;
        match read_config(storage) {
            Ok(read) if read == config => {}
            Ok(_) => self.note(Object::Config, "it is not the one this repository was opened with"),
            Err(error) => self.note_open(Object::Config, error),
        }
        let slots = storage.list(ObjectKind::KeySlot);
        let slots = slots.map_err(|source| ReadError::Io { object: "key slots".to_owned(), source })?;
        if slots.is_empty() && self.repository.encrypted() {
            self.note(Object::Config, FormatError::NoKeySlot);
        }
        for listed in slots {
            let Object::KeySlot(id) = listed.object else { continue };
            if let Err(error) = read_slot(storage, &config, id) {
                self.note_open(listed.object, error);
            }
        }
        Ok(())
    }

    fn note_open(&mut self, object: Object, error: OpenError) {
        let what = match error {
            OpenError::Damaged { source, .. } | OpenError::UnknownVersion(source) => source.to_string(),
            OpenError::NotARepository => "it is missing".to_owned(),
            OpenError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => "it is missing".to_owned(),
            OpenError::Io { source, .. } => cannot_be_read(&source),
            other => other.to_string(),
        };
        self.note(object, what);
    }

    /// Hashes every run; damaged ones are replaced.
    pub(super) fn check_index(&mut self) -> Result<(), VerifyError> {
        let index = self.repository.fetcher().index.clone();
        let mut damaged: Vec<(RunId, FormatError)> = Vec::new();
        for run in index.runs() {
            self.stop_if_cancelled()?;
            if !run.is_intact() {
                damaged.push((run.id, FormatError::Name));
            }
        }
        if !damaged.is_empty() {
            index.replace_damaged(damaged)?;
        }
        for SetAside { run, reason, kept } in index.take_set_aside() {
            let object = Object::IndexRun(run);
            if kept {
                let what = format!("{reason}; it was set aside and rebuilt from the packs");
                self.report.repaired.push(Damage { object, what, affected: Vec::new() });
            } else {
                self.note(object, format!("{reason}; it is not used, but could not be set aside"));
            }
        }
        Ok(())
    }

    pub(super) fn load_points(&mut self) -> Result<(), VerifyError> {
        let ids = match self.options.point {
            Some(id) => vec![id],
            None => self.repository.list_points()?,
        };
        for id in ids {
            match self.repository.load_point(id) {
                Ok(point) => {
                    self.report.points += 1;
                    self.progress.add_total(point.disks.iter().map(|disk| disk.size).sum());
                    self.points.push(point);
                }
                Err(ReadError::Damaged { object, source }) => self.note(object, source),
                Err(ReadError::NoSuchPoint { .. }) if self.options.point.is_none() => {} // dropped since the listing
                Err(ReadError::Io { source, .. }) => self.note(Object::Point(id), cannot_be_read(&source)),
                Err(error) => return Err(error.into()),
            }
        }
        self.points.sort_by_key(|point| point.time_unix_ns);
        Ok(())
    }

    /// The protections of the points that are verified, and where that is all of them, of points that are gone.
    pub(super) fn check_protections(&mut self) -> Result<(), VerifyError> {
        let (repository, only) = (self.repository, self.options.point);
        let listed = repository.storage().list(ObjectKind::Protection);
        let listed = listed.map_err(|source| ReadError::Io { object: "protections".to_owned(), source })?;
        for listed in listed {
            let Object::Protection(point) = listed.object else { continue };
            if only.is_some_and(|only| only != point) {
                continue;
            }
            let problem = match read_protection(repository.storage(), repository.id(), point) {
                Ok(Some(Protected::Damaged(problem))) => problem.to_string(),
                Ok(_) => continue,
                Err(PointError::Io { source, .. }) => cannot_be_read(&source),
                Err(error) => error.to_string(),
            };
            let machine = self.points.iter().find(|known| known.id == point).map(|known| known.machine.as_str());
            let machine = machine.map(|machine| format!(" of {machine}")).unwrap_or_default();
            self.note(listed.object, damaged_protection(&format!("{point}{machine}"), &problem));
        }
        Ok(())
    }

    /// The drills of the points that are verified.
    pub(super) fn check_drills(&mut self) -> Result<(), VerifyError> {
        for id in self.repository.drills()? {
            self.stop_if_cancelled()?;
            if self.options.point.is_some_and(|only| only != id.point) {
                continue;
            }
            match self.repository.drill(id) {
                Err(ReadError::Damaged { object, source }) => self.note(object, crate::drill::told(&source)),
                Err(ReadError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {} // dropped since
                Err(ReadError::Io { source, .. }) => self.note(Object::Drill(id), cannot_be_read(&source)),
                _ => {}
            }
        }
        Ok(())
    }
}

pub(super) fn cannot_be_read(error: &io::Error) -> String {
    format!("it cannot be read: {error}")
}
