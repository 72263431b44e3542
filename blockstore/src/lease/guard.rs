//! [`Lease`]: a lease that is held, and the thread that renews it.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::{error, warn};

use super::record::{LIFE, LeaseKind, LeaseRecord};
use super::{LeaseError, unix};
use crate::format::note;
use crate::id::{LeaseId, RepositoryId};
use crate::keys::random;
use crate::point::RecoveryPoint;
use crate::storage::{Object, Storage};

/// How often a lease is put anew.
const RENEW: Duration = Duration::from_secs(60);
/// The same after a failure.
const RETRY: Duration = Duration::from_secs(10);
/// Work that needs the lease is not begun when it ends within this many seconds.
const MARGIN: u64 = 120;

/// A lease that is held: renewed in the background, released when dropped. A recovery's stays when dropped, for whoever
/// takes the recovery up again; `Repository::release_recovery` ends it.
#[derive(Debug)]
pub struct Lease {
    held: Option<Arc<Held>>,
    renewing: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Held {
    storage: Arc<dyn Storage>,
    repository: RepositoryId,
    id: LeaseId,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug)]
struct State {
    record: LeaseRecord,
    /// Before it was put last.
    put: Instant,
    lapsed: bool,
    ended: bool,
}

impl Lease {
    /// Takes a lease: when this returns, whoever lists leases sees it.
    pub(crate) fn take(
        storage: Arc<dyn Storage>,
        repository: RepositoryId,
        id: Option<LeaseId>,
        kind: LeaseKind,
        owner: &str,
        points: &[&RecoveryPoint],
    ) -> Result<Lease, LeaseError> {
        let id = match id {
            Some(id) => id,
            None => LeaseId(random().map_err(|source| LeaseError::Io { object: "a lease".to_owned(), source })?),
        };
        let record = LeaseRecord::new(kind, owner, points, storage.surroundings());
        let state = State { record, put: Instant::now(), lapsed: false, ended: false };
        let held = Held { storage, repository, id, state: Mutex::new(state), wake: Condvar::new() };
        held.put(&held.lock().record)?;
        let held = Arc::new(held);
        let renewed = held.clone();
        let started = std::thread::Builder::new().name("lease".to_owned()).spawn(move || renewed.keep());
        // From here on its drop removes what was put.
        let mut lease = Lease { held: Some(held), renewing: None };
        let thread = |source| LeaseError::Io { object: "a lease: no thread to renew it".to_owned(), source };
        lease.renewing = Some(started.map_err(thread)?);
        Ok(lease)
    }

    /// The lease of somebody who goes on without.
    pub(crate) fn none() -> Lease {
        Lease { held: None, renewing: None }
    }

    /// Its name, if it stands in the repository.
    pub fn id(&self) -> Option<LeaseId> {
        self.held.as_ref().map(|held| held.id)
    }

    /// Makes sure that it still counts, and will for a while: it stands in the repository and does not end soon.
    pub fn confirm(&self) -> Result<(), LeaseError> {
        let Some(held) = &self.held else { return Ok(()) };
        held.confirm()
    }

    /// Ends it, a recovery's too.
    pub(crate) fn release(mut self) {
        self.end(true);
    }

    fn end(&mut self, delete: bool) {
        let Some(held) = self.held.take() else { return };
        held.lock().ended = true;
        held.wake.notify_all();
        if let Some(thread) = self.renewing.take()
            && thread.join().is_err()
        {
            error!(lease = %held.id, "the thread that renewed a lease panicked");
        }
        if delete && let Err(error) = held.storage.delete(&Object::Lease(held.id)) {
            warn!(lease = %held.id, %error, "a lease that is over cannot be removed; it will expire");
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let delete = self.held.as_ref().is_some_and(|held| held.lock().record.kind != LeaseKind::Recovery);
        self.end(delete);
    }
}

impl Held {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, record: &LeaseRecord) -> Result<(), LeaseError> {
        let object = Object::Lease(self.id);
        let bytes = note::encode(&note::LEASE, self.repository, record)?;
        self.storage.put(&object, &bytes).map_err(|source| LeaseError::Io { object: object.to_string(), source })
    }

    fn keep(&self) {
        let mut pause = RENEW;
        loop {
            let state = self.lock();
            let wait = self.wake.wait_timeout_while(state, pause, |state| !state.ended);
            let (state, _) = wait.unwrap_or_else(PoisonError::into_inner);
            if state.ended {
                return;
            }
            drop(state);
            pause = match self.renew() {
                Ok(()) => RENEW,
                Err(error @ LeaseError::Lapsed { .. }) => {
                    error!(%error, "work that relied on it will fail");
                    return;
                }
                Err(error) => {
                    warn!(lease = %self.id, %error, "a lease is not renewed, and will be tried again");
                    RETRY
                }
            };
        }
    }

    /// Puts it anew, unless it is gone or has run out: then others may have acted on that.
    pub(super) fn renew(&self) -> Result<(), LeaseError> {
        self.check(0)?;
        let began = Instant::now();
        let record = self.lock().record.renewed(unix(self.storage.surroundings().now()));
        self.put(&record)?;
        let mut state = self.lock();
        state.record = record;
        state.put = began;
        Ok(())
    }

    fn confirm(&self) -> Result<(), LeaseError> {
        self.check(MARGIN)
    }

    /// Whether it stands in the repository and counts for `margin` seconds more, by both clocks.
    fn check(&self, margin: u64) -> Result<(), LeaseError> {
        let mut state = self.lock();
        let lapsed = || LeaseError::Lapsed { lease: self.id, owner: state.record.owner.clone() };
        let now = unix(self.storage.surroundings().now());
        let over = now.saturating_add(margin) >= state.record.expires
            || (state.record.kind != LeaseKind::Recovery
                && state.put.elapsed().as_secs().saturating_add(margin) >= LIFE);
        if state.lapsed || over {
            let error = lapsed();
            state.lapsed |= margin == 0;
            return Err(error);
        }
        let object = Object::Lease(self.id);
        match self.storage.len(&object) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let error = lapsed();
                state.lapsed = true;
                Err(error)
            }
            Err(source) => Err(LeaseError::Io { object: object.to_string(), source }),
        }
    }
}

#[cfg(test)]
impl Lease {
    /// What the renewing thread does every minute.
    pub(super) fn renew_now(&self) -> Result<(), LeaseError> {
        self.held.as_ref().map_or(Ok(()), |held| held.renew())
    }
}
