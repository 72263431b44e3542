//! Backup: opens the sources of a machine's disks and stores them as one recovery point.

mod libvirt;
pub mod ova;
mod source;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use blockstore::{Consistency, PointDetails, Progress, RecoveryPoint, Repository, Source};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use libvirt::{DomainSpec, MachineView, machines};
pub(crate) use source::absolute_certificates;
pub use source::{NbdSource, is_uri, parse_source, parse_sources};

use crate::hardware::Hardware;
use crate::problem::{Kind, Problem};

/// Opens a disk to read it; what format it has is found out by looking where it is not given.
pub fn open_source(spec: &SourceSpec, format: Option<&str>) -> Result<Box<dyn Source>, Problem> {
    source::open(spec, format)
}

/// Longest machine, disk or label name.
const NAME_MAX: usize = 128;

/// Longest value of a label.
const LABEL_MAX: usize = 1024;

/// A disk to back up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SourceSpec {
    /// What the disk is called in the recovery point.
    pub disk: String,
    /// An absolute path, or an `nbd://` or `nbd+unix://` URI.
    pub location: String,
}

/// What to back up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BackupRequest {
    /// The machine.
    pub machine: String,
    /// Its disks in order; none of a domain, which has its own.
    #[serde(default)]
    pub sources: Vec<SourceSpec>,
    /// The libvirt domain that it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<DomainSpec>,
    /// Kept with the point.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// `raw` or `qcow2`; found out by looking when not given.
    #[serde(default)]
    pub format: Option<String>,
    /// What the machine is made of, where it is not what its newest point says.
    #[serde(default)]
    pub hardware: Hardware,
}

impl BackupRequest {
    /// Checks names, and that no disk is named twice.
    pub fn check(&self) -> Result<(), Problem> {
        check_name("machine", &self.machine)?;
        if self.domain.is_some() && self.sources.is_empty() {
            return check_labels(&self.labels);
        }
        if self.domain.is_some() || self.sources.is_empty() {
            return Err(Problem::usage(format!("machine {} has no disk to back up", self.machine)).hint(
                "name at least one image file, block device or NBD URI, or one libvirt:DOMAIN and nothing else",
            ));
        }
        let mut seen = HashSet::new();
        for source in &self.sources {
            check_name("disk", &source.disk)?;
            if !is_uri(&source.location) && !Path::new(&source.location).is_absolute() {
                return Err(Problem::usage(format!("`{}` is not an absolute path", source.location))
                    .hint("begin it with /: a service has a folder of its own"));
            }
            if !seen.insert(&source.disk) {
                return Err(Problem::usage(format!("disk {} is given twice", source.disk))
                    .hint("name each disk differently: root=a.qcow2 data=b.qcow2"));
            }
        }
        self.hardware.check(self.sources.iter().map(|source| source.disk.as_str()))?;
        check_labels(&self.labels)
    }

    /// The machine's definition: what is given here, and what the machine's newest point says where nothing is.
    fn hardware(&self, parent: Option<&RecoveryPoint>) -> serde_json::Value {
        let told = parent.map_or(serde_json::Value::Null, |parent| parent.hardware.clone());
        match Hardware::read(&told) {
            Ok(mut known) => {
                known.keep_disks(self.sources.iter().map(|source| source.disk.as_str()));
                self.hardware.clone().over(known).to_value()
            }
            // What a later version has written is kept as long as nothing else is said.
            Err(_) if self.hardware == Hardware::default() => told,
            Err(_) => self.hardware.to_value(),
        }
    }
}

/// Checks the labels of a new recovery point.
pub fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), Problem> {
    for (key, value) in labels {
        check_name("label", key)?;
        if value.len() > LABEL_MAX || value.chars().any(char::is_control) {
            return Err(Problem::usage(format!("label {key} cannot have the value {value:?}"))
                .hint(format!("use up to {LABEL_MAX} bytes without control characters")));
        }
    }
    Ok(())
}

/// What a backup did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BackupResult {
    /// The id of the new recovery point.
    pub point: String,
    /// Bytes read from the sources.
    pub read: u64,
    /// Bytes of chunks that the repository did not have.
    pub new: u64,
    /// Bytes that they take in the repository.
    pub stored: u64,
    /// `crash` or `application`.
    #[serde(default)]
    pub consistency: String,
    /// Of a commit: why it is no more than `crash`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why_crash: Option<String>,
    /// How long it took.
    pub seconds: f64,
}

impl BackupResult {
    /// What was done since `started` to make a point.
    pub fn of(point: &RecoveryPoint, started: Instant) -> BackupResult {
        BackupResult {
            point: point.id.to_string(),
            read: point.stats.read,
            new: point.stats.new_bytes,
            stored: point.stats.stored_bytes,
            consistency: consistency_word(point.consistency).to_owned(),
            why_crash: None,
            seconds: started.elapsed().as_secs_f64(),
        }
    }
}

/// How it is written.
pub fn consistency_word(consistency: Consistency) -> &'static str {
    match consistency {
        Consistency::Crash => "crash",
        Consistency::Application => "application",
    }
}

/// Names become parts of paths, URIs and export names.
pub fn check_name(what: &str, name: &str) -> Result<(), Problem> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+:".contains(&byte);
    if name.is_empty() || name.len() > NAME_MAX || name.starts_with(['.', '-']) || !name.bytes().all(good) {
        return Err(Problem::usage(format!("`{name}` cannot be the name of a {what}"))
            .hint(format!("use up to {NAME_MAX} letters, digits and . _ - + : with a letter or digit first")));
    }
    Ok(())
}

/// Disks with their names.
type NamedSources = Vec<(String, Box<dyn Source>)>;

/// Opens all disks of a machine.
fn open_all(request: &BackupRequest) -> Result<NamedSources, Problem> {
    let named = |spec: &SourceSpec| Ok((spec.disk.clone(), source::open(spec, request.format.as_deref())?));
    let ova = request.sources.iter().find(|spec| request.format.is_none() && ova::is_ova(&spec.location));
    let Some(spec) = ova else { return request.sources.iter().map(named).collect() };
    let path = Path::new(&spec.location);
    if request.sources.len() > 1 {
        return Err(Problem::usage(format!("{} holds all disks of a machine", path.display()))
            .hint("back it up by itself, or unpack it with tar and name its disks"));
    }
    let disks = ova::open(path)?;
    if disks.len() == 1 {
        return Ok(disks.into_iter().map(|disk| (spec.disk.clone(), disk)).collect());
    }
    Ok(disks.into_iter().enumerate().map(|(number, disk)| (format!("disk{number}"), disk)).collect())
}

/// Backs up a machine. A failure leaves no recovery point.
pub fn back_up(
    repository: &Repository,
    parent: Option<&RecoveryPoint>,
    request: &BackupRequest,
    progress: &Arc<Progress>,
) -> Result<BackupResult, Problem> {
    let Some(domain) = &request.domain else {
        return store(repository, parent, request, open_all, Consistency::Crash, progress);
    };
    let runtime = tokio::runtime::Handle::current();
    let captured = runtime.block_on(libvirt::capture(domain))?;
    let consistency = if domain.freeze { Consistency::Application } else { Consistency::Crash };
    // What the command line says goes before what the domain is.
    let read = BackupRequest {
        sources: captured.sources.clone(),
        domain: None,
        hardware: request.hardware.clone().over(captured.hardware.clone()),
        ..request.clone()
    };
    let open = |_: &BackupRequest| {
        let disks = captured.sources.iter().zip(&captured.formats);
        disks.map(|(spec, format)| Ok((spec.disk.clone(), source::open_known(spec, format.as_deref())?))).collect()
    };
    let result = store(repository, parent, &read, open, consistency, progress);
    runtime.block_on(captured.release());
    result
}

fn store(
    repository: &Repository,
    parent: Option<&RecoveryPoint>,
    request: &BackupRequest,
    open: impl FnOnce(&BackupRequest) -> Result<NamedSources, Problem>,
    consistency: Consistency,
    progress: &Arc<Progress>,
) -> Result<BackupResult, Problem> {
    request.check()?;
    let started = Instant::now();
    let sources = open(request)?;
    progress.expect(sources.iter().fold(0, |sum, (_, source)| sum.saturating_add(source.size())));
    let failed = |error: &blockstore::BackupError| Problem::from_backup(&request.machine, error);
    let mut backup =
        repository.begin_backup(&request.machine, parent, progress.clone()).map_err(|error| failed(&error))?;
    for (disk, source) in &sources {
        if source.size() == 0 {
            return Err(Problem::new(Kind::Usage, format!("disk {disk} of machine {} is empty", request.machine))
                .hint("its source has 0 bytes; name the right file"));
        }
        backup.add_disk(disk, source.as_ref()).map_err(|error| failed(&error))?;
    }
    let point = backup
        .seal(PointDetails { labels: request.labels.clone(), consistency, hardware: request.hardware(parent) })
        .map_err(|error| failed(&error))?;
    Ok(BackupResult::of(&point, started))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(machine: &str, disks: &[&str]) -> BackupRequest {
        let source = |disk: &&str| SourceSpec { disk: (*disk).to_owned(), location: "/x".into() };
        BackupRequest {
            machine: machine.into(),
            sources: disks.iter().map(source).collect(),
            labels: BTreeMap::new(),
            domain: None,
            format: None,
            hardware: Hardware::default(),
        }
    }

    #[test]
    fn names_that_could_leave_their_folder_are_refused() {
        request("web01.example", &["disk0", "data-1"]).check().unwrap();
        for machine in ["", ".", "..", "-x", "a/b", "a b", "a\n", &"x".repeat(200)] {
            assert_eq!(request(machine, &["disk0"]).check().unwrap_err().kind, Kind::Usage, "{machine}");
        }
        assert_eq!(request("m", &["a", "a"]).check().unwrap_err().kind, Kind::Usage);
        assert_eq!(request("m", &[]).check().unwrap_err().kind, Kind::Usage);
    }
}
