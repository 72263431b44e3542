//! Protecting recovery points, setting them free, and forgetting them by hand.

use std::collections::BTreeMap;

use blockstore::{PointError, Protected, RecoveryPointId};
use chrono::{DateTime, Local, NaiveDate, TimeZone, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::access::Caller;
use crate::app::App;
use crate::catalog::PointSummary;
use crate::catalog::spec::short_id;
use crate::problem::{Kind, Problem};

/// How long to protect.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ProtectRequest {
    /// When it ends; never if absent.
    pub until: Option<DateTime<Utc>>,
}

/// What a change of a point's protection did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProtectResult {
    /// The point.
    pub point: String,
    /// Whose it is; absent if the point cannot be read.
    pub machine: Option<String>,
    /// Whether it is protected now.
    pub protected: bool,
    /// Until when.
    pub until: Option<DateTime<Utc>>,
}

/// What was forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ForgetResult {
    /// The point.
    pub point: String,
    /// Whose it was; absent if the point could not be read.
    pub machine: Option<String>,
    /// Bytes that it had added to the repository: `collect` frees up to this many.
    pub stored: u64,
}

/// Who uses which points.
#[derive(Debug, Default)]
pub struct Uses(BTreeMap<String, Vec<String>>);

impl Uses {
    /// Whoever holds a lease, on any host, and the recoveries of the state folder, which may have none yet.
    pub fn of(app: &App) -> Result<Uses, Problem> {
        let mut uses: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let leases = app.repository.leases();
        let leases = leases.map_err(|error| Problem::from_read("cannot read who uses recovery points", &error))?;
        for lease in leases.iter().filter(|lease| !lease.verdict.is_stale()) {
            for point in lease.record.iter().flat_map(|record| &record.points) {
                uses.entry(point.id.to_string()).or_default().push(lease.holder());
            }
        }
        for recovery in app.recoveries.list() {
            let users = uses.entry(recovery.point).or_default();
            let name = format!("recovery {}", recovery.name);
            if !users.iter().any(|user| user.starts_with(&format!("{name} "))) {
                users.push(name);
            }
        }
        Ok(Uses(uses))
    }

    /// Who uses a point.
    pub fn of_point(&self, id: &str) -> &[String] {
        self.0.get(id).map_or(&[], Vec::as_slice)
    }
}

/// A point that is named, whether it can be read or not.
struct Named {
    id: String,
    summary: Option<PointSummary>,
}

impl Named {
    fn find(app: &App, caller: &Caller, spec: &str) -> Result<Named, Problem> {
        let problem = match app.resolve_for(caller, spec) {
            Ok(summary) => return Ok(Named { id: summary.id.clone(), summary: Some(summary) }),
            Err(problem) => problem,
        };
        match app.listing_for(caller)?.damaged_by(spec) {
            Some(damaged) => Ok(Named { id: damaged.id.clone(), summary: None }),
            None => Err(problem),
        }
    }

    fn machine(&self) -> Option<String> {
        self.summary.as_ref().map(|summary| summary.machine.clone())
    }

    fn title(&self) -> String {
        match &self.summary {
            Some(summary) => format!("recovery point {} of {}", short_id(&self.id), summary.machine),
            None => format!("damaged recovery point {}", short_id(&self.id)),
        }
    }
}

/// Protects a point.
pub fn protect(app: &App, caller: &Caller, spec: &str, request: &ProtectRequest) -> Result<ProtectResult, Problem> {
    let named = Named::find(app, caller, spec)?;
    let until = request.until.map(|until| u64::try_from(until.timestamp()).unwrap_or(0));
    app.repository
        .protect(id_of(&named.id)?, until, now())
        .map_err(|error| from_point(&format!("cannot protect {}", named.title()), &error))?;
    Ok(ProtectResult { machine: named.machine(), point: named.id, protected: true, until: request.until })
}

/// Sets a point free.
pub fn unprotect(app: &App, caller: &Caller, spec: &str) -> Result<ProtectResult, Problem> {
    let named = Named::find(app, caller, spec)?;
    app.repository
        .unprotect(id_of(&named.id)?)
        .map_err(|error| from_point(&format!("cannot unprotect {}", named.title()), &error))?;
    Ok(ProtectResult { machine: named.machine(), point: named.id, protected: false, until: None })
}

/// Forgets a point. Its machine's newest only if that is said.
pub fn forget(app: &App, caller: &Caller, spec: &str, newest_too: bool) -> Result<ForgetResult, Problem> {
    let named = Named::find(app, caller, spec)?;
    let title = format!("cannot forget {}", named.title());
    let mut heir = None;
    if let Some(summary) = &named.summary {
        let newest = app.points()?.into_iter().rfind(|point| point.machine == summary.machine);
        let newest = newest.map_or_else(|| named.id.clone(), |newest| newest.id.clone());
        if newest == named.id && !newest_too {
            return Err(Problem::refused(format!("{title}: it is the newest of this machine"))
                .hint("with --newest it is forgotten all the same"));
        }
        heir = (newest != named.id).then_some(newest);
    }
    if let [first, ..] = Uses::of(app)?.of_point(&named.id) {
        return Err(Problem::refused(format!("{title}: it is in use by {first}"))
            .hint("`lifeboat recoveries` lists recoveries; end what uses it first"));
    }
    forget_one(app, &named.id, heir.as_ref())?;
    let stored = named.summary.as_ref().map_or(0, |summary| summary.stored);
    Ok(ForgetResult { machine: named.machine(), point: named.id, stored })
}

/// Forgets one point that nothing protects, in favour of its machine's newest.
pub(crate) fn forget_one(app: &App, id: &str, heir: Option<&String>) -> Result<(), Problem> {
    let heir = heir.map(|heir| id_of(heir)).transpose()?;
    app.repository
        .forget(id_of(id)?, heir, now())
        .map_err(|error| from_point(&format!("cannot forget recovery point {}", short_id(id)), &error))
}

fn id_of(id: &str) -> Result<RecoveryPointId, Problem> {
    id.parse().map_err(|_| Problem::usage(format!("`{id}` is not the id of a recovery point")))
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    u64::try_from(Utc::now().timestamp()).unwrap_or(0)
}

/// A day as a person writes it, to its end in the local zone; or a time.
pub fn parse_until(text: &str) -> Result<DateTime<Utc>, String> {
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Ok(time.to_utc());
    }
    let bad = || format!("`{text}` is not a date; write 2027-01-31 (its end) or 2027-01-31T03:00:00Z");
    let day = NaiveDate::parse_from_str(text, "%Y-%m-%d").map_err(|_| bad())?;
    let end = day.succ_opt().and_then(|next| next.and_hms_opt(0, 0, 0)).ok_or_else(bad)?;
    // Where clocks skip midnight, the day ends when the next hour begins.
    let hours = (0..=24).filter_map(|hour| end.checked_add_signed(chrono::TimeDelta::hours(hour)));
    let mut ends = hours.filter_map(|end| Local.from_local_datetime(&end).latest());
    ends.next().map(|end| end.to_utc()).ok_or_else(bad)
}

fn from_point(title: &str, error: &PointError) -> Problem {
    match error {
        PointError::NoSuchPoint { .. } => Problem::because(Kind::NotFound, title, error),
        PointError::Protected { protected, .. } => {
            let how = match protected {
                Protected::Until(until) => {
                    let until = i64::try_from(*until).ok().and_then(|until| DateTime::from_timestamp(until, 0));
                    let until = until.unwrap_or(DateTime::<Utc>::MAX_UTC).with_timezone(&Local);
                    format!("it is protected until {}", until.format("%Y-%m-%d %H:%M:%S"))
                }
                Protected::Always => "it is protected".to_owned(),
                Protected::Damaged(why) => format!("it is protected, and the protection is damaged: {why}"),
            };
            Problem::refused(format!("{title}: {how}")).hint("`lifeboat unprotect` sets it free")
        }
        PointError::Past => Problem::because(Kind::Usage, title, error).hint("name a later date"),
        PointError::HeirGone { .. } => {
            Problem::because(Kind::Refused, title, error).hint("`lifeboat points` lists what there is; try again")
        }
        PointError::Busy(_) => Problem::because(Kind::Refused, title, error).hint("try again in a moment"),
        PointError::Io { .. } => Problem::failed(title, error),
    }
}
