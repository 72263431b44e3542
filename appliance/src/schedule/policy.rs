//! A policy as the configuration has it: what is done, to which machines, when, and who is told.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{Deserializer, Error};

use super::machines::{DomainSet, DomainsConfig, DrillConfig, Drills, NamePattern};
use super::plan::{Missed, Overlap, Plan, Window, Zone};
use crate::capture::{BackupRequest, check_name, parse_sources};
use crate::hardware::Hardware;
use crate::retention::{Rules, Span};
use crate::verify::VerifyRequest;

/// Tries after the first.
const RETRIES_MAX: u32 = 20;

/// One policy of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct PolicyConfig {
    schedule: Pattern,
    #[serde(default)]
    time_zone: Option<ZoneName>,
    #[serde(default)]
    jitter: Option<Length>,
    #[serde(default)]
    window: Option<Hours>,
    #[serde(default)]
    missed: MissedName,
    #[serde(default)]
    overlap: OverlapName,
    #[serde(default)]
    retries: Option<Retries>,
    #[serde(default)]
    retry_delay: Option<Length>,
    #[serde(default)]
    machines: BTreeMap<String, MachineConfig>,
    #[serde(default)]
    libvirt: Option<DomainsConfig>,
    #[serde(default)]
    drill: Option<DrillConfig>,
    #[serde(default)]
    retention: Option<RetentionConfig>,
    #[serde(default)]
    verify: Option<Portion>,
    #[serde(default)]
    collect: bool,
    #[serde(default)]
    before: Option<Program>,
    #[serde(default)]
    after: Option<Program>,
    #[serde(default)]
    hook_deadline: Option<Length>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct MachineConfig {
    sources: Vec<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    format: Option<String>,
    #[serde(default)]
    drill: Option<DrillConfig>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct RetentionConfig {
    keep_last: u64,
    keep_hourly: u64,
    keep_daily: u64,
    keep_weekly: u64,
    keep_monthly: u64,
    keep_yearly: u64,
    keep_within: Option<Age>,
}

/// Who is told what.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct AlertsConfig {
    /// A program that is told.
    pub command: Option<Program>,
    /// An address that is told.
    pub webhook: Option<Webhook>,
    /// A machine whose newest verified point is older is told of.
    pub stale_after: Option<Length>,
    /// Free space of the repository's and the state folder's file systems below which it is told of.
    pub low_space: Option<Room>,
}

/// Which programs are told of what happens.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct HooksConfig {
    /// Of drills that are judged.
    pub drill: Option<Program>,
    /// Of recoveries whose state is another.
    pub recovery: Option<Program>,
    /// How long each of them may take.
    pub deadline: Option<Length>,
}

/// What a policy does.
#[derive(Debug, Clone)]
pub struct Policy {
    /// When.
    pub plan: Plan,
    /// Which backups it makes, in order.
    pub backups: Vec<BackupRequest>,
    /// Which domains of a libvirt it backs up after these.
    pub domains: Option<DomainSet>,
    /// Which machines it drills afterwards, and how.
    pub drills: Option<Drills>,
    /// What it keeps of them; all if absent.
    pub retention: Option<Rules>,
    /// What it verifies afterwards.
    pub verify: Option<VerifyRequest>,
    /// Whether it frees space afterwards.
    pub collect: bool,
    /// How often it tries again what failed.
    pub retries: u32,
    /// How long it waits before the first of these; twice as long each time.
    pub retry_delay: Duration,
    /// Run before each backup; if it fails the backup fails.
    pub before: Option<Program>,
    /// Run after each backup, whatever came of it.
    pub after: Option<Program>,
    /// How long each of them may take.
    pub hook_deadline: Duration,
}

impl PolicyConfig {
    /// The policy, or the key below the policy's and what is wrong with it.
    pub fn policy(&self, name: &str) -> Result<Policy, (String, String)> {
        let wrong = |key: &str, what: String| (key.to_owned(), what);
        check_name("policy", name).map_err(|problem| wrong("", problem.to_string()))?;
        let mut plan = Plan::new(&self.schedule.0).map_err(|what| wrong("schedule", what))?;
        plan.zone = self.time_zone.as_ref().map_or(Zone::Local, |zone| zone.0);
        plan.jitter = self.jitter.map_or(Duration::ZERO, |length| length.0);
        plan.window = self.window.map(|hours| hours.0);
        plan.missed = if self.missed == MissedName::Skip { Missed::Skip } else { Missed::Run };
        plan.overlap = if self.overlap == OverlapName::Wait { Overlap::Wait } else { Overlap::Skip };
        if plan.next(chrono::Utc::now()).is_none() {
            return Err(wrong("schedule", format!("`{}` is never due", self.schedule.0)));
        }
        let mut backups = Vec::new();
        for (machine, config) in &self.machines {
            let key = format!("machines.{machine}.sources");
            let sources = parse_sources(&config.sources).map_err(|problem| wrong(&key, problem.to_string()))?;
            let (labels, format) = (config.labels.clone(), config.format.clone());
            let hardware = Hardware::default();
            let machine = machine.clone();
            let request = BackupRequest { machine, sources, domain: None, labels, format, hardware };
            request.check().map_err(|problem| wrong(&key, problem.to_string()))?;
            backups.push(request);
        }
        let domains = self.libvirt.as_ref().map(DomainsConfig::set).transpose();
        let domains = domains.map_err(|(key, what)| wrong(key, what))?;
        let drills = self.drills()?;
        let backs_up = !backups.is_empty() || domains.is_some();
        let retention = self.retention.as_ref().map(RetentionConfig::rules);
        if let Some(rules) = &retention {
            if !backs_up {
                return Err(wrong("retention", "there are no machines whose points it could be for".to_owned()));
            }
            rules.check().map_err(|problem| wrong("retention", problem.to_string()))?;
            if rules.is_empty() {
                return Err(wrong("retention", "it keeps nothing; say what to keep".to_owned()));
            }
        }
        let verify = self.verify.as_ref().map(|portion| portion.0.clone());
        if !backs_up && drills.is_none() && verify.is_none() && !self.collect {
            return Err(wrong("", "it does nothing: give it machines, libvirt, drill, verify or collect".to_owned()));
        }
        Ok(Policy {
            plan,
            backups,
            domains,
            drills,
            retention,
            verify,
            collect: self.collect,
            retries: self.retries.map_or(2, |retries| retries.0),
            retry_delay: self.retry_delay.map_or(Duration::from_secs(60), |length| length.0),
            before: self.before.clone(),
            after: self.after.clone(),
            hook_deadline: self.hook_deadline.map_or(Duration::from_secs(300), |length| length.0),
        })
    }
}

impl PolicyConfig {
    fn drills(&self) -> Result<Option<Drills>, (String, String)> {
        let mut own = BTreeMap::new();
        for (machine, config) in &self.machines {
            let Some(drill) = &config.drill else { continue };
            let key = format!("machines.{machine}.drill");
            if self.drill.is_none() {
                return Err((key, "the policy has no drill".to_owned()));
            }
            own.insert(machine.clone(), drill.own().map_err(|problem| (key, problem.to_string()))?);
        }
        let drills = self.drill.as_ref().map(|drill| drill.drills(own)).transpose();
        drills.map_err(|problem| ("drill".to_owned(), problem.to_string()))
    }
}

impl Policy {
    /// Whether it makes points of any machine.
    pub fn backs_up(&self) -> bool {
        !self.backups.is_empty() || self.domains.is_some()
    }

    /// The machines that it backs up, as the configuration names them.
    pub fn machines(&self) -> impl Iterator<Item = &str> {
        let domains = self.domains.iter().flat_map(|set| set.patterns.iter().map(NamePattern::text));
        self.backups.iter().map(|backup| backup.machine.as_str()).chain(domains)
    }

    /// The machines that it has to back up by their very names.
    pub fn named(&self) -> impl Iterator<Item = &str> {
        let domains = self.domains.iter().flat_map(|set| set.patterns.iter().filter_map(NamePattern::name));
        self.backups.iter().map(|backup| backup.machine.as_str()).chain(domains)
    }

    /// Whether it backs a machine up.
    pub fn covers(&self, machine: &str) -> bool {
        let by_pattern = self.domains.as_ref().is_some_and(|set| set.matches(machine));
        by_pattern || self.backups.iter().any(|backup| backup.machine == machine)
    }

    /// Whether it drills a machine.
    pub fn drills(&self, machine: &str) -> bool {
        let drills = self.drills.as_ref().is_some_and(|drills| drills.are_for(machine));
        drills && (!self.backs_up() || self.covers(machine))
    }
}

impl RetentionConfig {
    fn rules(&self) -> Rules {
        Rules {
            last: self.keep_last,
            hourly: self.keep_hourly,
            daily: self.keep_daily,
            weekly: self.keep_weekly,
            monthly: self.keep_monthly,
            yearly: self.keep_yearly,
            within: self.keep_within.map(|age| age.0),
            labels: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum MissedName {
    #[default]
    Run,
    Skip,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum OverlapName {
    #[default]
    Skip,
    Wait,
}

/// A value that is written as a string, and checked where it is read.
macro_rules! from_text {
    ($(#[$doc:meta])* $name:ident($of:ty) = $parse:expr, $($derive:ident),*) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq $(, $derive)*)]
        pub struct $name(pub $of);

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                let parse: fn(&str) -> Result<$of, String> = $parse;
                parse(&text).map($name).map_err(D::Error::custom)
            }
        }
    };
}

from_text!(
    /// A cron pattern.
    Pattern(String) = |text| Plan::new(text).map(|_| text.to_owned()),
);
from_text!(
    /// The name of a time zone.
    ZoneName(Zone) = Zone::parse, Copy
);
from_text!(
    /// A length of time.
    Length(Duration) = |text| crate::cli::parse_duration(text).map(Duration::from_secs), Copy
);
from_text!(
    /// Hours of the day.
    Hours(Window) = Window::parse, Copy
);
from_text!(
    /// An age by the calendar.
    Age(Span) = Span::parse, Copy
);
from_text!(
    /// A number of bytes.
    Room(u64) = crate::cli::parse_size, Copy
);
from_text!(
    /// How much is verified: `structure`, or a share or size of the data.
    Portion(VerifyRequest) = parse_portion,
);
from_text!(
    /// An address that alerts are sent to. What it says may be a secret, so it is not shown.
    Webhook(WebhookUrl) = WebhookUrl::parse,
);

fn parse_portion(text: &str) -> Result<VerifyRequest, String> {
    let portion = (text != "structure").then(|| text.to_owned());
    let request = VerifyRequest { read_data: portion.is_some(), portion, ..VerifyRequest::default() };
    request.data().map(|_| request).map_err(|problem| problem.title)
}

/// The parts of a webhook's address.
#[derive(Clone, PartialEq, Eq)]
pub struct WebhookUrl {
    /// Whether it is spoken to with TLS.
    pub tls: bool,
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// The rest.
    pub path: String,
}

impl std::fmt::Debug for WebhookUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WebhookUrl").field("host", &self.host).finish_non_exhaustive()
    }
}

impl WebhookUrl {
    fn parse(text: &str) -> Result<WebhookUrl, String> {
        // The text itself is not told: it may hold a secret.
        let bad = || "this is not an address; write https://HOST[:PORT]/PATH".to_owned();
        let uri: axum::http::Uri = text.parse().map_err(|_| bad())?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(bad()),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(bad)?.trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let path = uri.path_and_query().map_or("/".to_owned(), ToString::to_string);
        Ok(WebhookUrl { tls, host, port, path })
    }
}

/// A program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program(pub Vec<String>);

impl<'de> Deserialize<'de> for Program {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let words = Vec::<String>::deserialize(deserializer)?;
        match words.first() {
            Some(program) if program.starts_with('/') => Ok(Program(words)),
            _ => Err(D::Error::custom("a command is a list that begins with the absolute path of a program")),
        }
    }
}

/// How often to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retries(u32);

impl<'de> Deserialize<'de> for Retries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match u32::deserialize(deserializer)? {
            retries if retries <= RETRIES_MAX => Ok(Retries(retries)),
            retries => Err(D::Error::custom(format!("{retries} retries are too many; at most {RETRIES_MAX}"))),
        }
    }
}
