//! What a recovery's journal says, and a recovery made from it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::Timings;
use super::journal::Journal;
use super::one::{Context, Definition, Driver, Recovery, Shown};
use super::schedule::{Commits, Committed, Schedule};
use super::state::State;
use crate::exports::FirstRead;
use crate::problem::{Kind, Problem};
use crate::rehydrate::Plan;

/// A line of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub(super) enum Record {
    /// The first line.
    Created { version: u32, definition: Box<Definition> },
    /// QEMU is about to be started like this.
    Vm { machine: Box<hypervisor::MachineDefinition> },
    /// Its disks are being moved like this; `held`: why nothing is copied for now.
    Move { plan: Box<Plan>, held: Option<String> },
    /// What the guest had written became this recovery point. All of it was durable in the overlays before.
    Committed(Committed),
    /// How often it is to be committed from now on.
    Schedule { schedule: Option<Schedule> },
    /// The state was entered.
    State { state: State, problem: Option<String> },
}

/// The journal's version.
const VERSION: u32 = 1;

impl Recovery {
    /// Makes a recovery's folder and journal. Nothing else exists yet.
    ///
    /// Order: (1) the folder, with the machine's UEFI variables if it comes with some; (2) the journal's first line,
    /// which does not hold them; (3) the sync of the folder above.
    pub fn create(context: Arc<Context>, mut definition: Definition) -> Result<Arc<Recovery>, Problem> {
        let dir = context.state.recoveries().join(&definition.name);
        let what = format!("cannot make recovery {} in {}", definition.name, dir.display());
        let cannot = |error: &(dyn std::error::Error + 'static)| Problem::failed(what.clone(), error);
        // A folder without a journal is what a finished discard may leave when the power goes.
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(cannot(&error)),
            _ => {}
        }
        crate::state_dir::create_private_dir(&dir.join("disks")).map_err(|error| cannot(&error))?;
        if let Some(variables) = definition.request.hardware.uefi_vars.take() {
            definition.request.hardware.firmware = Some("uefi".to_owned());
            super::machine::keep_variables(&dir, &variables).map_err(|error| cannot(&error))?;
        }
        let mut journal = Journal::create(&dir.join("journal")).map_err(|error| cannot(&error))?;
        journal
            .append(&Record::Created { version: VERSION, definition: Box::new(definition.clone()) })
            .map_err(|error| cannot(&error))?;
        sync_dir(&context.state.recoveries()).map_err(|error| cannot(&error))?;
        let driver = Driver::new(journal, State::Publishing);
        let commits = Commits::begin(&definition.request);
        Ok(Recovery::assemble(context, definition, dir, driver, commits, None))
    }

    /// Reads back a recovery's journal. Nothing is served or changed yet. One that was never begun, because the power
    /// went before its first record was durable, is removed.
    pub fn load(context: Arc<Context>, name: &str) -> Result<Option<Arc<Recovery>>, Problem> {
        let dir = context.state.recoveries().join(name);
        let cannot = |error: &(dyn std::error::Error + 'static)| {
            Problem::because(Kind::Damage, format!("cannot take up recovery {name}"), error)
                .hint(format!("its overlays lie untouched in {}", dir.display()))
        };
        let (journal, records) = Journal::open::<Record>(&dir.join("journal")).map_err(|error| cannot(&error))?;
        let mut records = records.into_iter();
        let definition = match records.next() {
            Some(Record::Created { version: VERSION, definition }) => *definition,
            Some(Record::Created { version, .. }) => {
                return Err(cannot(&io::Error::other(format!(
                    "its journal has version {version}, this is for {VERSION}"
                ))));
            }
            Some(_) => return Err(cannot(&io::Error::other("its journal does not say what it is of"))),
            // Overlays are made after the first record.
            None if fs::read_dir(dir.join("disks")).is_ok_and(|mut disks| disks.next().is_some()) => {
                return Err(cannot(&io::Error::other("its journal is empty, but its overlays are there")));
            }
            None => {
                fs::remove_dir_all(&dir).map_err(|error| cannot(&error))?;
                return Ok(None);
            }
        };
        let mut driver = Driver::new(journal, State::Publishing);
        let mut problem = None;
        let mut commits = Commits::begin(&definition.request);
        for record in records {
            match record {
                Record::Created { .. } => return Err(cannot(&io::Error::other("its journal begins twice"))),
                Record::Vm { machine } => driver.machine = Some(*machine),
                Record::Move { plan, held } => {
                    driver.plan = Some(*plan);
                    driver.held = held;
                }
                Record::Committed(committed) => commits.last = Some(committed),
                Record::Schedule { schedule } => commits.schedule = schedule,
                Record::State { state, problem: why } => {
                    driver.state = state;
                    problem = why;
                }
            }
        }
        Ok(Some(Recovery::assemble(context, definition, dir, driver, commits, problem)))
    }

    fn assemble(
        context: Arc<Context>,
        definition: Definition,
        dir: PathBuf,
        driver: Driver,
        commits: Commits,
        problem: Option<String>,
    ) -> Arc<Recovery> {
        let asked = Instant::now();
        Arc::new(Recovery {
            context,
            definition,
            dir,
            asked,
            first_read: FirstRead::since(asked),
            shown: Mutex::new(Shown {
                state: driver.state,
                problem,
                accelerator: None,
                vm: None,
                pid: None,
                uris: Vec::new(),
                disks: Vec::new(),
                plan: driver.plan.clone().filter(|_| driver.state.moves()),
                moving: None,
                committing: None,
                commits,
                table: None,
                timings: Timings::default(),
                domain: driver.machine.as_ref().and_then(super::domain::view),
                changes: Vec::new(),
            }),
            driver: tokio::sync::Mutex::new(driver),
        })
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    fs::File::open(dir)?.sync_all()
}
