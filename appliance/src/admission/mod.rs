//! Admission: whether this host can carry one more VM. See docs/design/admission.md

mod cgroup;
pub mod host;
mod queue;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problem::Problem;
pub use queue::{Admission, Grant};

/// What QEMU itself needs beside the guest's memory.
const OVERHEAD: u64 = 64 << 20;
/// The host keeps a sixteenth of its memory, within these bounds.
const RESERVE_MIN: u64 = 128 << 20;
const RESERVE_MAX: u64 = 1 << 30;
/// Without this much free space a guest would be stopped by its first writes.
const SPACE_MIN: u64 = 64 << 20;
/// Less free space than this is warned of.
const SPACE_WARN: u64 = 2 << 30;
/// More virtual CPUs than this for each of the host's are warned of.
const CPUS_PER_CORE: u64 = 2;

/// What an asker says about a host that is full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Terms {
    /// Refuse.
    #[default]
    Check,
    /// Wait until there is room.
    Queue,
    /// Start all the same.
    Force,
}

/// What a VM takes. Without a VM, both are 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Ask {
    /// Guest memory in bytes.
    pub memory: u64,
    /// Virtual CPUs.
    pub cpus: u32,
}

/// The host as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Host {
    /// All memory.
    pub memory_total: u64,
    /// Memory that could be used now.
    pub memory_available: u64,
    /// What a control group limits all of it to, if one does; the two above heed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<u64>,
    /// All swap; it is never counted as memory.
    #[serde(default)]
    pub swap_total: u64,
    /// Swap that is not used.
    #[serde(default)]
    pub swap_free: u64,
    /// CPUs.
    pub cores: u32,
    /// Free bytes where overlays are kept; absent when it cannot be told.
    pub space: Option<u64>,
}

/// A recovery that runs, or is about to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Holder {
    /// Its name.
    pub name: String,
    /// What its VM may take.
    #[serde(flatten)]
    pub ask: Ask,
    /// Memory it has touched already.
    pub resident: u64,
}

/// What the host carries and could carry, as the API shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Capacity {
    /// The host.
    #[serde(flatten)]
    pub host: Host,
    /// Memory that is kept for it.
    pub reserve: u64,
    /// Memory for further VMs.
    pub room: u64,
    /// VMs with as much memory as `recover` gives by default.
    pub more_vms: u64,
    /// Who holds memory.
    pub holders: Vec<Holder>,
    /// Who waits for memory, first in first out.
    pub waiting: Vec<Holder>,
}

/// What `recover` gives a guest by default.
const DEFAULT_MEMORY: u64 = 2 << 30;

impl Capacity {
    /// Adds up.
    pub fn new(host: Host, holders: Vec<Holder>, waiting: Vec<Holder>) -> Capacity {
        let reserve = reserve(&host);
        let room = host.memory_available.saturating_sub(reserve).saturating_sub(promised(&holders));
        Capacity { host, reserve, room, more_vms: room / (DEFAULT_MEMORY + OVERHEAD), holders, waiting }
    }

    /// Whether one more can start now, or why not. `before`: how many others wait.
    pub fn decide(&self, name: &str, ask: Ask, before: usize) -> Result<Vec<String>, Refusal> {
        if let Some(space) = self.host.space.filter(|space| *space < SPACE_MIN) {
            return Err(Refusal::Space { space });
        }
        let mut warnings = Vec::new();
        if let Some(space) = self.host.space.filter(|space| *space < SPACE_WARN) {
            warnings.push(format!("only {} are free for what the guest of {name} writes", mib(space)));
        }
        if ask.memory == 0 {
            return Ok(warnings);
        }
        if self.host.swap_total > 0 && self.host.swap_free < self.host.swap_total / 2 {
            let swapped = self.host.swap_total - self.host.swap_free;
            warnings.push(format!("this host has swapped out {}: guests will be slow", mib(swapped)));
        }
        let needed = ask.memory.saturating_add(OVERHEAD);
        if needed > self.host.memory_total.saturating_sub(self.reserve) {
            return Err(Refusal::Never { needed });
        }
        if before > 0 {
            return Err(Refusal::Turn { before });
        }
        if needed > self.room {
            return Err(Refusal::Memory { needed });
        }
        let cpus: u64 = self.holders.iter().map(|holder| u64::from(holder.ask.cpus)).sum::<u64>() + u64::from(ask.cpus);
        if cpus > u64::from(self.host.cores) * CPUS_PER_CORE {
            warnings
                .push(format!("{cpus} virtual CPUs share the {} of this host: guests will be slow", self.host.cores));
        }
        Ok(warnings)
    }

    /// A refusal as it is told of a drill, which has no queue and no `--force`.
    pub fn explain_drill(&self, name: &str, refusal: Refusal) -> Problem {
        let told = self.explain(name, refusal);
        let title = told.title.replacen(&format!("recovery {name}"), &format!("the {name}"), 1);
        Problem { title, hint: None, ..told }.hint("make room there, or give the guest less with --memory")
    }

    /// A refusal as it is told.
    pub fn explain(&self, name: &str, refusal: Refusal) -> Problem {
        let title = format!("recovery {name} is not started");
        let give = "give it less with --memory, `lifeboat discard` another";
        let anyway = "--force starts it all the same";
        match refusal {
            Refusal::Space { space } => Problem::refused(format!(
                "{title}: only {} are free in the state folder, where what its guest writes is kept",
                mib(space)
            ))
            .hint(format!("make room there, or name another folder with --state; {anyway}")),
            Refusal::Never { needed } => Problem::refused(format!(
                "{title}: it needs {} of memory, and this host has {} in all, of which it keeps {} for itself",
                mib(needed),
                mib(self.host.memory_total),
                mib(self.reserve)
            ))
            .hint(format!("give it less with --memory; {anyway}")),
            Refusal::Turn { before } => {
                Problem::refused(format!("{title}: requests that wait for memory before it: {before}"))
                    .hint(format!("--queue waits behind them; {anyway}"))
            }
            Refusal::Memory { needed } => {
                let hold = |holder: &Holder| format!("{} holds {}", holder.name, mib(holder.ask.memory));
                let holders: Vec<String> = self.holders.iter().map(hold).collect();
                let holders = if holders.is_empty() { "no recovery holds any".to_owned() } else { holders.join(", ") };
                Problem::refused(format!(
                    "{title}: it needs {} of memory, and there is room for {}; {holders}",
                    mib(needed),
                    mib(self.room)
                ))
                .hint(format!("{give}, or wait for memory with --queue; {anyway}"))
            }
        }
    }
}

/// Why a VM is not started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No space for overlays.
    Space {
        /// Free bytes.
        space: u64,
    },
    /// More memory than the host could ever give.
    Never {
        /// In bytes.
        needed: u64,
    },
    /// Others came first.
    Turn {
        /// How many.
        before: usize,
    },
    /// Not enough memory now.
    Memory {
        /// In bytes.
        needed: u64,
    },
}

impl Refusal {
    /// Whether it may go away by waiting.
    pub fn passes(self) -> bool {
        match self {
            Refusal::Turn { .. } | Refusal::Memory { .. } => true,
            Refusal::Space { .. } | Refusal::Never { .. } => false,
        }
    }
}

fn reserve(host: &Host) -> u64 {
    (host.memory_total / 16).clamp(RESERVE_MIN, RESERVE_MAX)
}

/// Memory that guests may take and have not touched yet: the host counts it as available.
fn promised(holders: &[Holder]) -> u64 {
    let one = |holder: &Holder| holder.ask.memory.saturating_add(OVERHEAD).saturating_sub(holder.resident);
    holders.iter().filter(|holder| holder.ask.memory > 0).fold(0, |sum, holder| sum.saturating_add(one(holder)))
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn capacity(total: u64, available: u64, holders: &[(u64, u64)]) -> Capacity {
        let host = Host {
            memory_total: total,
            memory_available: available,
            memory_limit: None,
            swap_total: 0,
            swap_free: 0,
            cores: 2,
            space: Some(100 * GIB),
        };
        let holder = |(memory, resident): &(u64, u64)| Holder {
            name: "other".to_owned(),
            ask: Ask { memory: *memory, cpus: 2 },
            resident: *resident,
        };
        Capacity::new(host, holders.iter().map(holder).collect(), Vec::new())
    }

    #[test]
    fn memory_that_guests_have_not_touched_yet_is_not_given_twice() {
        let needed = 2 * GIB + OVERHEAD;
        let table = [
            (16 * GIB, 12 * GIB, vec![], Ok(())),
            (16 * GIB, 3 * GIB, vec![], Err(Refusal::Memory { needed })),
            (16 * GIB, 4 * GIB, vec![(GIB, 0)], Err(Refusal::Memory { needed })),
            (16 * GIB, 4 * GIB, vec![(GIB, GIB)], Ok(())),
            (16 * GIB, 4 * GIB, vec![(GIB, 9 * GIB)], Ok(())),
            (16 * GIB, 4 * GIB, vec![(u64::MAX, 0), (u64::MAX, 0)], Err(Refusal::Memory { needed })),
            (2 * GIB, 2 * GIB, vec![], Err(Refusal::Never { needed })),
            (4 * GIB, 3 * GIB, vec![], Ok(())),
        ];
        for (at, (total, available, holders, wanted)) in table.into_iter().enumerate() {
            let decided = capacity(total, available, &holders).decide("vm", Ask { memory: 2 * GIB, cpus: 2 }, 0);
            assert_eq!(decided.map(|_| ()), wanted, "row {at}");
        }
    }

    #[test]
    fn small_guests_start_on_a_small_host() {
        let small = capacity(4 * GIB, 2 * GIB, &[(GIB / 2, 0), (GIB / 2, 0)]);
        assert_eq!(small.decide("vm", Ask { memory: GIB / 2, cpus: 2 }, 0).map(|warnings| warnings.len()), Ok(1));
        assert_eq!((small.more_vms, capacity(16 * GIB, 12 * GIB, &[]).more_vms), (0, 5));
    }

    #[test]
    fn swap_gives_no_room_and_a_host_that_swaps_is_warned_of() {
        let mut host = capacity(16 * GIB, GIB, &[]);
        (host.host.swap_total, host.host.swap_free) = (64 * GIB, 64 * GIB);
        assert!(host.decide("vm", Ask { memory: 2 * GIB, cpus: 1 }, 0).is_err());
        let small = Ask { memory: 64 << 20, cpus: 1 };
        host.room = GIB;
        assert_eq!(host.decide("vm", small, 0), Ok(Vec::new()));
        host.host.swap_free = 31 * GIB;
        assert_eq!(host.decide("vm", small, 0).map(|warnings| warnings.len()), Ok(1));
    }

    #[test]
    fn who_came_first_is_served_first_and_space_and_size_come_before_the_turn() {
        let ask = Ask { memory: GIB, cpus: 1 };
        let mut host = capacity(16 * GIB, 12 * GIB, &[]);
        assert_eq!(host.decide("vm", ask, 2), Err(Refusal::Turn { before: 2 }));
        assert_eq!(host.decide("vm", ask, 0), Ok(Vec::new()));
        host.host.space = Some(SPACE_WARN - 1);
        assert_eq!(host.decide("vm", ask, 0).map(|warnings| warnings.len()), Ok(1));
        host.host.space = Some(SPACE_MIN - 1);
        let refusal = host.decide("vm", Ask { memory: 0, cpus: 0 }, 0).unwrap_err();
        assert!(!refusal.passes() && host.explain("vm", refusal).to_string().contains("63 MiB"), "{refusal:?}");
    }

    #[test]
    fn a_refusal_says_what_is_needed_what_is_there_who_holds_it_and_what_to_do() {
        let host = capacity(16 * GIB, 4 * GIB, &[(3 * GIB, 0)]);
        let said = host.explain("vm", host.decide("vm", Ask { memory: GIB, cpus: 1 }, 0).unwrap_err()).to_string();
        let wanted =
            ["1088 MiB", "room for 0 MiB", "other holds 3072 MiB", "--memory", "discard", "--queue", "--force"];
        assert!(wanted.iter().all(|part| said.contains(part)), "{said}");
    }
}
