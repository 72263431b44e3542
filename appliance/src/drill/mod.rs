//! Drills: recovery points booted in isolation on throw-away overlays, judged and measured. See docs/design/drills.md
//!
//! [`course`] is the pure core, `run` drives one drill, `batch` several within a budget, `report` keeps and finds what they
//! brought.

mod batch;
mod checks;
mod console;
pub mod course;
mod report;
mod run;
mod screen;
mod signs;
mod traced;
mod warm;
mod watch;

use hypervisor::Keep;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use batch::{Plan, plan, run_all};
pub use report::{Attachment, Filter, attachment, list, show};
pub use run::clean_up;
pub use warm::warm;

use crate::catalog::PointSummary;
use crate::hardware::Hardware;
use crate::problem::Problem;
use crate::recovery::{HypervisorKind, Identity, RecoverRequest};
use course::{CheckView, Stage, Times};

/// What to drill, and how to judge it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct DrillRequest {
    /// Recovery points, as [`crate::catalog::spec`] takes them.
    pub points: Vec<String>,
    /// Regular expressions that the console has to show.
    pub expect: Vec<String>,
    /// Ports of the guest that have to accept TCP connections.
    pub ports: Vec<u16>,
    /// The guest agent has to answer.
    pub agent: bool,
    /// A command line that has to succeed in the guest, run by its agent.
    pub command: Option<String>,
    /// The screen has to show something, and to stop changing.
    pub screenshot: bool,
    /// Seconds that each drill may take.
    pub timeout: u64,
    /// Drills at once; as many as the host has CPUs for when not given.
    pub parallel: Option<usize>,
    /// Memory in bytes that the guests of all drills may have together; what the host has left when not given.
    pub memory_budget: Option<u64>,
    /// `isolated` or `none`.
    pub network: String,
    /// `auto`, `kvm` or `tcg`.
    pub accel: String,
    /// What the machines are made of, where it is not what their points say.
    #[serde(flatten)]
    pub hardware: Hardware,
}

impl Default for DrillRequest {
    fn default() -> DrillRequest {
        DrillRequest {
            points: Vec::new(),
            expect: Vec::new(),
            ports: Vec::new(),
            agent: false,
            command: None,
            screenshot: false,
            timeout: 300,
            parallel: None,
            memory_budget: None,
            network: "isolated".to_owned(),
            accel: "auto".to_owned(),
            hardware: Hardware::default(),
        }
    }
}

impl DrillRequest {
    /// The machine that is asked for.
    fn machine(&self, point: &PointSummary) -> RecoverRequest {
        RecoverRequest {
            commits: None,
            point: point.id.clone(),
            name: None,
            on: HypervisorKind::Qemu,
            network: self.network.clone(),
            accel: self.accel.clone(),
            display: "none".to_owned(),
            mac: None,
            hardware: self.hardware.clone(),
            keep: Keep::Transient,
            identity: Identity::Fresh,
            serve_on: None,
            runs_as: None,
        }
    }

    /// Refuses what no drill can be made of, before anything exists. What it returns are its checks.
    fn checks(&self) -> Result<Vec<checks::Check>, Problem> {
        const TIMEOUT_MAX: u64 = 24 * 3600;
        if !["isolated", "none"].contains(&self.network.as_str()) {
            return Err(Problem::usage(format!("a drill has no network `{}`", self.network))
                .hint("use isolated or none: a copy of a machine must not meet the machine"));
        }
        if self.network == "none" && !self.ports.is_empty() {
            return Err(Problem::usage("a guest without a network has no port").hint("leave out --network none"));
        }
        if self.timeout == 0 || self.timeout > TIMEOUT_MAX {
            return Err(Problem::usage(format!("a drill cannot take {} seconds", self.timeout))
                .hint(format!("give a --timeout of 1 to {TIMEOUT_MAX}")));
        }
        if self.parallel == Some(0) {
            return Err(Problem::usage("no drill at all can run at once").hint("give --parallel 1 or more"));
        }
        checks::Check::all(self)
    }

    /// Whether drills can be made of it.
    pub fn check(&self) -> Result<(), Problem> {
        self.checks().map(|_| ())
    }
}

/// How a drill ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DrillResult {
    /// All checks passed.
    Passed,
    /// They did not.
    Failed,
}

impl std::fmt::Display for DrillResult {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DrillResult::Passed => "passed",
            DrillResult::Failed => "failed",
        })
    }
}

/// What a drill found. Stored with the point but for the paths.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DrillReport {
    /// Its name, if it is kept.
    #[serde(default)]
    pub id: Option<String>,
    /// The recovery point.
    pub point: String,
    /// The machine that it is of.
    pub machine: String,
    /// When it began.
    pub time: chrono::DateTime<chrono::Utc>,
    /// How it ended.
    pub result: DrillResult,
    /// What was reached last.
    pub stage: Stage,
    /// Why it failed, if it did.
    pub reason: Option<String>,
    /// The measured recovery time: from the command until all checks had passed.
    pub rto_ms: Option<u64>,
    /// When what happened.
    pub times: Times,
    /// The checks.
    pub checks: Vec<CheckView>,
    /// What showed that a kernel runs.
    pub kernel_by: Option<String>,
    /// How often the guest has reset itself.
    pub resets: u32,
    /// How long the drill took.
    pub seconds: f64,
    /// `kvm` or `tcg`, and why.
    pub accelerator: Option<String>,
    /// Bytes the guest read from its disks.
    pub bytes_read: u64,
    /// Chunks that it touched.
    pub chunks_read: u64,
    /// Bytes it wrote.
    pub bytes_written: u64,
    /// The last lines of its console.
    #[serde(default)]
    pub console_tail: Vec<String>,
    /// A file with the console log, on the host that ran the drill.
    #[serde(default)]
    pub console: Option<String>,
    /// A PNG file of the screen, on the host that ran the drill.
    #[serde(default)]
    pub screenshot: Option<String>,
    /// What was odd.
    #[serde(default)]
    pub warnings: Vec<String>,
}
