//! How a drill goes: the pure core. Events go in, with the milliseconds since the drill began; out comes where it stands.
//!
//! ```text
//! publishing -> starting -> firmware -> boot-loader -> kernel -> ready
//!     exports      QEMU       first       the kernel,     all
//!     serve        runs       block       or more         checks
//!                             is read     is seen         passed
//! ```
//!
//! A stage is what was reached last, and is never gone back from: a guest that resets itself is counted, not set back.
//! Once there is an outcome nothing changes any more.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A guest that resets itself this often is in a loop.
pub const RESETS_MAX: u32 = 3;

/// How far a guest has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Its disks are being published.
    Publishing,
    /// Its machine is being started.
    Starting,
    /// The machine runs and has not read its disks yet.
    Firmware,
    /// Something was read from a disk.
    BootLoader,
    /// A kernel runs, or what comes after it.
    Kernel,
    /// All checks passed.
    Ready,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Stage::Publishing => "publishing",
            Stage::Starting => "starting",
            Stage::Firmware => "firmware",
            Stage::BootLoader => "boot-loader",
            Stage::Kernel => "kernel",
            Stage::Ready => "ready",
        })
    }
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The disks are served.
    Published,
    /// QEMU runs.
    Started,
    /// The first block was read.
    FirstRead,
    /// A kernel shows; by what.
    Kernel(String),
    /// A check passed, by its number; with what it saw.
    Passed(usize, String),
    /// A check failed for good, by its number.
    Refused(usize, String),
    /// The guest reset itself.
    Reset,
    /// Something that ends the drill badly.
    Broken(String),
    /// Time is up.
    Deadline,
}

/// Milliseconds since the drill began; absent while it has not happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Times {
    /// Until the exports served.
    pub published_ms: Option<u64>,
    /// Until QEMU ran.
    pub started_ms: Option<u64>,
    /// Until the first block was read.
    pub first_block_ms: Option<u64>,
    /// Until a kernel showed.
    pub kernel_ms: Option<u64>,
    /// Until all checks had passed: the measured recovery time.
    pub ready_ms: Option<u64>,
}

/// A check as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CheckView {
    /// What is checked.
    pub check: String,
    /// Whether it passed.
    pub passed: bool,
    /// What it saw.
    #[serde(default)]
    pub detail: Option<String>,
}

/// A check, as the course sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// What is checked, for a person.
    pub name: String,
    /// Whether only a running system can pass it.
    pub proves_kernel: bool,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// All checks passed.
    Passed,
    /// Why not.
    Failed(String),
}

/// A drill on its way.
#[derive(Debug, Clone)]
pub struct Course {
    stage: Stage,
    times: Times,
    planned: Vec<Planned>,
    checks: Vec<CheckView>,
    kernel_by: Option<String>,
    resets: u32,
    verdict: Option<Verdict>,
}

impl Course {
    /// Nothing has happened yet. There is at least one check.
    pub fn new(planned: Vec<Planned>) -> Course {
        let view = |planned: &Planned| CheckView { check: planned.name.clone(), passed: false, detail: None };
        Course {
            stage: Stage::Publishing,
            times: Times::default(),
            checks: planned.iter().map(view).collect(),
            planned,
            kernel_by: None,
            resets: 0,
            verdict: None,
        }
    }

    /// Takes an event that happened `at` milliseconds after the beginning.
    pub fn apply(&mut self, event: Event, at: u64) {
        if self.verdict.is_some() {
            return;
        }
        match event {
            Event::Published => self.reach(Stage::Starting, at),
            Event::Started => self.reach(Stage::Firmware, at),
            Event::FirstRead => self.reach(Stage::BootLoader, at),
            Event::Kernel(by) => {
                self.kernel_by.get_or_insert(by);
                self.reach(Stage::Kernel, at);
            }
            Event::Passed(number, saw) => self.pass(number, saw, at),
            Event::Refused(number, why) => {
                let Some(check) = self.checks.get_mut(number) else { return };
                check.detail = Some(why.clone());
                self.verdict = Some(Verdict::Failed(format!("{}: {why}", check.check)));
            }
            Event::Reset => {
                self.resets += 1;
                if self.resets >= RESETS_MAX {
                    let why = format!("the guest has reset itself {} times without coming up", self.resets);
                    self.verdict = Some(Verdict::Failed(why));
                }
            }
            Event::Broken(why) => self.verdict = Some(Verdict::Failed(why)),
            Event::Deadline => {
                let open = self.checks.iter().filter(|check| !check.passed).map(|check| check.check.as_str());
                let open: Vec<&str> = open.collect();
                self.verdict = Some(Verdict::Failed(format!("time is up; not seen: {}", open.join(", "))));
            }
        }
    }

    fn pass(&mut self, number: usize, saw: String, at: u64) {
        let Some(check) = self.checks.get_mut(number) else { return };
        if check.passed {
            return;
        }
        check.passed = true;
        check.detail = Some(saw);
        if self.planned.get(number).is_some_and(|planned| planned.proves_kernel) {
            self.kernel_by.get_or_insert_with(|| check.check.clone());
            self.reach(Stage::Kernel, at);
        }
        if self.checks.iter().all(|check| check.passed) {
            self.stage = Stage::Ready;
            // Checks are told in the order in which they were looked at, not in that in which they came true.
            self.times.ready_ms = Some(at.max(self.times.started_ms.unwrap_or(0)));
            self.verdict = Some(Verdict::Passed);
        }
    }

    /// Enters a stage, and those before it that were not seen.
    fn reach(&mut self, stage: Stage, at: u64) {
        let times = &mut self.times;
        let time = match stage {
            Stage::Publishing => return,
            Stage::Starting => &mut times.published_ms,
            Stage::Firmware => &mut times.started_ms,
            Stage::BootLoader => &mut times.first_block_ms,
            Stage::Kernel => &mut times.kernel_ms,
            Stage::Ready => &mut times.ready_ms,
        };
        time.get_or_insert(at);
        self.stage = self.stage.max(stage);
    }

    /// What was reached last.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// When what happened.
    pub fn times(&self) -> Times {
        self.times
    }

    /// The checks.
    pub fn checks(&self) -> &[CheckView] {
        &self.checks
    }

    /// What showed the kernel.
    pub fn kernel_by(&self) -> Option<&str> {
        self.kernel_by.as_deref()
    }

    /// How often the guest has reset itself.
    pub fn resets(&self) -> u32 {
        self.resets
    }

    /// How it ended, if it did.
    pub fn verdict(&self) -> Option<&Verdict> {
        self.verdict.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn course(checks: &[(&str, bool)]) -> Course {
        let planned =
            |(name, proves_kernel): &(&str, bool)| Planned { name: (*name).to_owned(), proves_kernel: *proves_kernel };
        Course::new(checks.iter().map(planned).collect())
    }

    fn after(mut course: Course, events: &[(Event, u64)]) -> Course {
        events.iter().for_each(|(event, at)| course.apply(event.clone(), *at));
        course
    }

    #[test]
    fn a_guest_that_passes_every_check_is_ready_at_the_last() {
        let events = [
            (Event::Published, 10),
            (Event::Started, 50),
            (Event::FirstRead, 60),
            (Event::Kernel("its console".into()), 500),
            (Event::Passed(1, "pong".into()), 900),
            (Event::Passed(1, "pong again".into()), 950),
            (Event::Passed(0, "up".into()), 1000),
            (Event::Broken("too late to matter".into()), 1001),
        ];
        let ended = after(course(&[("console", false), ("agent", true)]), &events);
        assert_eq!((ended.stage(), ended.verdict()), (Stage::Ready, Some(&Verdict::Passed)));
        let times = ended.times();
        assert_eq!((times.published_ms, times.started_ms, times.first_block_ms), (Some(10), Some(50), Some(60)));
        assert_eq!((times.kernel_ms, times.ready_ms), (Some(500), Some(1000)));
        assert_eq!(ended.checks()[1].detail.as_deref(), Some("pong"));
        assert_eq!(ended.kernel_by(), Some("its console"));
    }

    #[test]
    fn a_failure_keeps_the_stage_that_was_reached() {
        let begun = [(Event::Published, 1), (Event::Started, 2)];
        let firmware = after(course(&[("console", false)]), &begun);
        assert_eq!(firmware.stage(), Stage::Firmware);
        let loader = after(firmware.clone(), &[(Event::FirstRead, 3), (Event::Deadline, 4)]);
        assert_eq!(loader.stage(), Stage::BootLoader);
        assert!(matches!(loader.verdict(), Some(Verdict::Failed(why)) if why.contains("console")));
        let kernel = [(Event::FirstRead, 3), (Event::Kernel("a write".into()), 4), (Event::Broken("panic".into()), 5)];
        let kernel = after(firmware, &kernel);
        assert_eq!((kernel.stage(), kernel.verdict()), (Stage::Kernel, Some(&Verdict::Failed("panic".into()))));
        assert_eq!(kernel.times().ready_ms, None);
    }

    #[test]
    fn a_check_that_only_a_system_can_pass_shows_the_kernel() {
        let passed = [(Event::Started, 2), (Event::Passed(0, "pong".into()), 7)];
        let agent = after(course(&[("agent", true), ("console", false)]), &passed);
        assert_eq!(
            (agent.stage(), agent.times().kernel_ms, agent.kernel_by()),
            (Stage::Kernel, Some(7), Some("agent"))
        );
        let passed = [(Event::Started, 2), (Event::Passed(1, "seen".into()), 7)];
        assert_eq!(after(course(&[("agent", true), ("console", false)]), &passed).stage(), Stage::Firmware);
    }

    #[test]
    fn a_reset_loop_fails_and_one_reset_does_not() {
        let events: Vec<_> = (0..u64::from(RESETS_MAX)).map(|at| (Event::Reset, at)).collect();
        assert_eq!(after(course(&[("console", false)]), &events[..2]).verdict(), None);
        let looped = after(course(&[("console", false)]), &events);
        assert!(matches!(looped.verdict(), Some(Verdict::Failed(why)) if why.contains("3 times")));
    }

    #[test]
    fn a_check_that_failed_for_good_ends_the_drill_with_its_reason() {
        let failed = after(course(&[("command", true)]), &[(Event::Refused(0, "status 3".into()), 7)]);
        assert_eq!(failed.verdict(), Some(&Verdict::Failed("command: status 3".into())));
        assert_eq!(after(course(&[("a", false)]), &[(Event::Passed(9, String::new()), 1)]).verdict(), None);
    }
}
