//! The moment a guest leaves its overlay. The order, for both ways: docs/design/rehydration.md

use std::sync::Arc;
use std::time::Duration;

use hypervisor::{MachineError, MirrorError, Status};

use super::moving::Moving;
use super::one::{Driver, Recovery};
use super::record::Record;
use super::state::{Event, State};
use crate::journal::{Journal, JournalError};
use crate::problem::Problem;
use crate::rehydrate::{CopyError, MirrorFault};

/// How often a journal that cannot be written is tried again while the guest waits.
const JOURNAL_RETRY: Duration = Duration::from_secs(1);

/// Why a guest was not moved.
#[derive(Debug, thiserror::Error)]
pub(super) enum CutoverError {
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error(transparent)]
    Mirror(Box<MirrorFault>),
    #[error("its VM is {0}")]
    NotRunning(Status),
    #[error("its VM cannot be held")]
    Hold(#[source] Box<MachineError>),
    #[error("another NBD client uses disk {0}, which is no longer served after the cutover")]
    InUse(String),
    #[error("the journal cannot be written")]
    Journal(#[source] JournalError),
    #[error("disk {disk} could not be moved")]
    Pivot {
        disk: String,
        #[source]
        source: Box<MirrorError>,
    },
}

impl From<MirrorFault> for CutoverError {
    fn from(fault: MirrorFault) -> CutoverError {
        CutoverError::Mirror(Box::new(fault))
    }
}

impl From<MachineError> for CutoverError {
    fn from(error: MachineError) -> CutoverError {
        CutoverError::Hold(Box::new(error))
    }
}

impl Recovery {
    /// Moves the guest onto the copy. The order: docs/design/rehydration.md
    pub async fn cut_over(self: &Arc<Self>) -> Result<(), Problem> {
        let mut driver = self.driver.lock().await;
        let name = self.name().to_owned();
        if driver.state == State::Rehydrating {
            return Err(Problem::refused(format!("not everything of recovery {name} is on production storage yet"))
                .hint(format!("`lifeboat recovery {name}` shows how far it is")));
        }
        self.enter(&mut driver, Event::CutoverRequested, None)?;
        driver.stop_watchers();
        let Some(moving) = driver.moving.take() else {
            self.enter(&mut driver, Event::SwitchFailed, None)?;
            return Err(Problem::refused(format!("recovery {name} is not being copied"))
                .hint(format!("`lifeboat rehydrate {name} --resume`")));
        };
        let outcome = match moving {
            Moving::Stream(mut stream) => {
                let journal = &mut driver.journal;
                let outcome = tokio::task::block_in_place(|| stream.cut_over(|| decide(journal)));
                if outcome.is_err() {
                    driver.moving = Some(Moving::Stream(stream));
                }
                outcome
            }
            Moving::Mirror(mut mirror) => {
                let outcome = self.switch(&mut driver, &mut mirror).await;
                mirror.detach().await;
                outcome
            }
        };
        match outcome {
            Ok(pause) => {
                // The journal has it already.
                (driver.state, _) = driver.state.apply(Event::Switched);
                let millis = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
                tracing::info!(recovery = %name, pause_ms = millis, "recovery cut over");
                self.show(|shown| {
                    shown.state = State::CutOver;
                    shown.problem = None;
                    shown.moving = None;
                    shown.timings.cutover_pause_ms = Some(millis);
                });
                if driver.mirrors() {
                    self.leave_overlays(&mut driver).await?;
                }
                self.redefine_vm(&mut driver).await;
                self.remove_overlays();
                self.release_lease(&mut driver);
                self.watch(&mut driver);
                Ok(())
            }
            Err(error) => {
                let cannot = format!("recovery {name} is not cut over, its guest runs on as before");
                let problem = Problem::failed(cannot, &error);
                self.enter(&mut driver, Event::SwitchFailed, None)?;
                self.note_move(&mut driver, Some(crate::problem::chain(&error)))?;
                self.show(|shown| shown.moving = None);
                self.watch(&mut driver);
                Err(problem.hint(format!("when the cause is gone: `lifeboat rehydrate {name} --resume`")))
            }
        }
    }
}

/// Journals that the guest is on production storage. If that fails, nobody knows which of the two the journal says, and
/// going on on either could lose what the guest writes: it waits until the journal can be read and says.
pub(super) fn decide(journal: &mut Journal) -> Result<(), CutoverError> {
    let record = Record::State { state: State::CutOver, problem: None };
    let Err(first) = journal.append(&record) else { return Ok(()) };
    tracing::error!(error = %first, "the journal cannot be written in the middle of a cutover; the guest waits");
    loop {
        match Journal::open::<Record>(journal.path()) {
            Ok((reopened, records)) => {
                *journal = reopened;
                // It says nothing of it, and what was half written is cut off durably.
                if !matches!(records.last(), Some(Record::State { state: State::CutOver, .. })) {
                    return Err(CutoverError::Journal(first));
                }
                // What is read need not be durable: it is said again.
                if journal.append(&record).is_ok() {
                    return Ok(());
                }
            }
            Err(error) => tracing::error!(%error, "the journal cannot be read either; the guest waits on"),
        }
        std::thread::sleep(JOURNAL_RETRY);
    }
}

/// Journals what must be there before the guest goes on, however long that takes.
pub(super) fn insist(driver: &mut Driver, record: &Record) {
    while let Err(error) = driver.journal.append(record) {
        tracing::error!(%error, "the journal cannot be written in the middle of a cutover; the guest waits");
        std::thread::sleep(JOURNAL_RETRY);
        match Journal::open::<Record>(driver.journal.path()) {
            Ok((reopened, _)) => driver.journal = reopened,
            Err(error) => tracing::error!(%error, "the journal cannot be read either; the guest waits on"),
        }
    }
}
