//! The machines of a policy: those that it names, the domains of libvirt that its patterns match, and their drills.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use globset::{Glob, GlobMatcher};
use serde::Deserialize;
use serde::de::{Deserializer, Error};

use super::policy::{Length, Room};
use crate::capture::{BackupRequest, DomainSpec, MachineView};
use crate::drill::DrillRequest;
use crate::hardware::Hardware;
use crate::problem::{Kind, Problem};

/// Which libvirt, where it is not said.
const SYSTEM: &str = "qemu:///system";

/// The name of a machine, or a pattern with `*`, `?` and `[...]` that many names match.
#[derive(Clone)]
pub struct NamePattern {
    text: String,
    matcher: GlobMatcher,
}

impl NamePattern {
    /// Whether it is for this machine.
    pub fn matches(&self, machine: &str) -> bool {
        self.matcher.is_match(machine)
    }

    /// The name, if it is no pattern.
    pub fn name(&self) -> Option<&str> {
        (!self.text.contains(['*', '?', '[', ']', '{', '\\'])).then_some(&self.text)
    }

    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl std::fmt::Debug for NamePattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.text)
    }
}

impl PartialEq for NamePattern {
    fn eq(&self, other: &NamePattern) -> bool {
        self.text == other.text
    }
}

impl Eq for NamePattern {}

impl<'de> Deserialize<'de> for NamePattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bad = |why: String| D::Error::custom(format!("`{text}` is neither a name nor a pattern{why}"));
        if text.is_empty() {
            return Err(bad(String::new()));
        }
        match Glob::new(&text) {
            Ok(glob) => Ok(NamePattern { matcher: glob.compile_matcher(), text }),
            Err(error) => Err(bad(format!(": {}", error.kind()))),
        }
    }
}

/// Domains of a libvirt, as the configuration has them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DomainsConfig {
    domains: Vec<NamePattern>,
    #[serde(default)]
    connect: Option<String>,
    #[serde(default)]
    freeze: bool,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

/// Domains of a libvirt, each backed up as a machine of its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainSet {
    /// Which libvirt.
    pub uri: String,
    /// Which of its domains.
    pub patterns: Vec<NamePattern>,
    freeze: bool,
    labels: BTreeMap<String, String>,
}

impl DomainsConfig {
    /// The domains, or the key and what is wrong with it.
    pub fn set(&self) -> Result<DomainSet, (&'static str, String)> {
        if self.domains.is_empty() {
            return Err(("libvirt.domains", "it names no domain".to_owned()));
        }
        crate::capture::check_labels(&self.labels).map_err(|problem| ("libvirt.labels", problem.to_string()))?;
        Ok(DomainSet {
            uri: self.connect.clone().unwrap_or_else(|| SYSTEM.to_owned()),
            patterns: self.domains.clone(),
            freeze: self.freeze,
            labels: self.labels.clone(),
        })
    }
}

impl DomainSet {
    /// Whether a machine of this name is one of them.
    pub fn matches(&self, machine: &str) -> bool {
        self.patterns.iter().any(|pattern| pattern.matches(machine))
    }

    /// The backups of those of `found` that are meant. Recoveries that run on the libvirt are not, unless they are named.
    /// A pattern that matches none is a mistake: whoever wrote it believes that something is backed up.
    pub fn backups(&self, found: &[MachineView]) -> Result<Vec<BackupRequest>, Problem> {
        let meant = |pattern: &NamePattern, domain: &MachineView| {
            pattern.matches(&domain.name) && (domain.recovery.is_none() || pattern.name().is_some())
        };
        let none = self.patterns.iter().filter(|pattern| !found.iter().any(|domain| meant(pattern, domain)));
        let none: Vec<&str> = none.map(NamePattern::text).collect();
        if !none.is_empty() {
            let title = format!("libvirt:{} has no domain `{}`", self.uri, none.join("`, `"));
            return Err(Problem::new(Kind::NotFound, title)
                .hint(format!("`lifeboat machines --on libvirt:{}` lists them", self.uri)));
        }
        let domains = found.iter().filter(|domain| self.patterns.iter().any(|pattern| meant(pattern, domain)));
        Ok(domains.map(|domain| self.backup(&domain.name)).collect())
    }

    fn backup(&self, domain: &str) -> BackupRequest {
        BackupRequest {
            machine: domain.to_owned(),
            sources: Vec::new(),
            domain: Some(DomainSpec { uri: self.uri.clone(), domain: domain.to_owned(), freeze: self.freeze }),
            labels: self.labels.clone(),
            format: None,
            hardware: Hardware::default(),
        }
    }
}

/// A drill as the configuration has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct DrillConfig {
    expect: Vec<String>,
    ports: Vec<u16>,
    agent: bool,
    command: Option<String>,
    screenshot: bool,
    timeout: Option<Length>,
    memory: Option<Room>,
    cpus: Option<u32>,
    accel: Option<String>,
    machines: Option<Vec<NamePattern>>,
    parallel: Option<NonZeroUsize>,
}

impl DrillConfig {
    /// The drill of one machine, which differs from the policy's usual one.
    pub fn own(&self) -> Result<DrillRequest, Problem> {
        if self.machines.is_some() || self.parallel.is_some() {
            return Err(Problem::usage("`machines` and `parallel` are for the drill of a policy"));
        }
        self.request()
    }

    /// The drills of a policy; `own` are those of machines that have checks of their own.
    pub fn drills(&self, own: BTreeMap<String, DrillRequest>) -> Result<Drills, Problem> {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Ok(Drills {
            machines: self.machines.clone(),
            parallel: self.parallel.map_or(cores.div_ceil(2), NonZeroUsize::get),
            usual: self.request()?,
            own,
        })
    }

    /// What is asked for, but for the point.
    fn request(&self) -> Result<DrillRequest, Problem> {
        let usual = DrillRequest::default();
        let request = DrillRequest {
            expect: self.expect.clone(),
            ports: self.ports.clone(),
            agent: self.agent,
            command: self.command.clone(),
            screenshot: self.screenshot,
            timeout: self.timeout.map_or(usual.timeout, |length| length.0.as_secs()),
            accel: self.accel.clone().unwrap_or(usual.accel),
            hardware: Hardware { memory: self.memory.map(|room| room.0), cpus: self.cpus, ..Hardware::default() },
            ..DrillRequest::default()
        };
        request.check()?;
        Ok(request)
    }
}

/// The drills of a policy.
#[derive(Debug, Clone)]
pub struct Drills {
    machines: Option<Vec<NamePattern>>,
    /// How many at once.
    pub parallel: usize,
    usual: DrillRequest,
    own: BTreeMap<String, DrillRequest>,
}

impl Drills {
    /// Whether a machine is drilled when its turn comes.
    pub fn are_for(&self, machine: &str) -> bool {
        self.machines.as_ref().is_none_or(|patterns| patterns.iter().any(|pattern| pattern.matches(machine)))
    }

    /// The drill of a machine's newest point.
    pub fn of(&self, machine: &str) -> DrillRequest {
        let request = self.own.get(machine).unwrap_or(&self.usual).clone();
        DrillRequest { points: vec![machine.to_owned()], ..request }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(name: &str, recovery: Option<&str>) -> MachineView {
        MachineView {
            name: name.into(),
            uuid: String::new(),
            state: "running".into(),
            persistent: true,
            recovery: recovery.map(Into::into),
            disks: Vec::new(),
        }
    }

    #[test]
    fn domains_are_found_by_name_and_by_pattern_and_recoveries_among_them_are_left_alone() {
        let set = |domains: &str| {
            let config: DomainsConfig = toml::from_str(&format!("domains = {domains}\nfreeze = true")).unwrap();
            config.set().unwrap()
        };
        let found = [domain("web-1", None), domain("web-2", None), domain("web-3", Some("/s/r")), domain("db", None)];
        let names = |domains: &str| {
            let backups = set(domains).backups(&found)?;
            Ok::<_, Problem>(backups.into_iter().map(|backup| backup.machine).collect::<Vec<_>>())
        };
        assert_eq!(names("[\"web-*\"]").unwrap(), ["web-1", "web-2"]);
        assert_eq!(names("[\"web-?\", \"db\", \"web-1\"]").unwrap(), ["web-1", "web-2", "db"]);
        assert_eq!(names("[\"web-3\"]").unwrap(), ["web-3"]);
        let problem = names("[\"mail*\", \"db\"]").unwrap_err();
        assert!(problem.title.contains("`mail*`") && !problem.title.contains("db"), "{problem}");
        let backup = set("[\"db\"]").backups(&found).unwrap().remove(0);
        backup.check().unwrap();
        assert!(backup.domain.unwrap().freeze);
    }

    #[test]
    fn a_machine_with_checks_of_its_own_has_those_and_the_others_the_usual_ones() {
        let config: DrillConfig =
            toml::from_str("machines = [\"web*\"]\nexpect = [\"login:\"]\ntimeout = \"2m\"\nmemory = \"1G\"").unwrap();
        let own: DrillConfig = toml::from_str("ports = [22]").unwrap();
        let drills = config.drills([("web01".to_owned(), own.own().unwrap())].into()).unwrap();
        assert!(drills.are_for("web02") && !drills.are_for("db01"));
        let usual = drills.of("web02");
        assert_eq!((usual.points, usual.expect, usual.timeout), (vec!["web02".into()], vec!["login:".into()], 120));
        assert_eq!(usual.hardware.memory, Some(1 << 30));
        let own = drills.of("web01");
        assert_eq!((own.ports, own.expect), (vec![22], vec![]));
        for bad in ["expect = [\"(\"]", "timeout = \"0s\"", "prots = [22]", "machines = [\"[\"]", "parallel = 0"] {
            let read = toml::from_str::<DrillConfig>(bad).map(|config| config.drills(BTreeMap::new()));
            assert!(!matches!(read, Ok(Ok(_))), "{bad}");
        }
    }
}
