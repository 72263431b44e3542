//! What `/metrics` says besides what exports serve: machines and the age of their points, jobs, recoveries, policies, room.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use blockstore::CacheUse;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::app::App;
use crate::catalog::PointSummary;
use crate::jobs::{JobView, Totals};
use crate::problem::Problem;
use crate::recovery::{RecoveryView, RehydrationView};
use crate::schedule::{RunResult, ScheduleView};

/// Label names and values.
type Labels = Vec<(&'static str, String)>;

/// A metric's name, what it is, what kind, and its values.
#[derive(Debug)]
struct Metric {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    values: Vec<(Labels, f64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
}

/// All of them at one moment.
#[derive(Debug, Default)]
pub struct House(Vec<Metric>);

/// What they are made of.
#[derive(Debug, Default)]
struct Looked {
    points: Vec<Arc<PointSummary>>,
    running: Vec<JobView>,
    totals: BTreeMap<(String, &'static str), Totals>,
    recoveries: Vec<RecoveryView>,
    schedules: Vec<ScheduleView>,
    free: Vec<(&'static str, u64)>,
    cache: Option<CacheUse>,
}

impl House {
    /// Looks at everything; it may block.
    pub fn look(app: &App) -> Result<House, Problem> {
        let places = [("repository", app.location.as_path()), ("state", app.state.root())];
        let free = places.into_iter().filter_map(|(what, path)| {
            let stat = rustix::fs::statvfs(path).ok()?;
            Some((what, stat.f_bavail.saturating_mul(stat.f_frsize)))
        });
        let schedules = app.schedules.get();
        Ok(House::of(&Looked {
            points: app.points()?,
            running: app.jobs.running().into_iter().map(|job| job.view()).collect(),
            totals: app.jobs.totals(),
            recoveries: app.recoveries.list(),
            schedules: schedules.map_or(Vec::new(), |schedules| schedules.list()),
            free: free.collect(),
            cache: Some(app.repository.cache_use()),
        }))
    }

    fn of(looked: &Looked) -> House {
        let info = vec![(vec![("version", env!("CARGO_PKG_VERSION").to_owned())], 1.0)];
        let free = looked.free.iter().map(|(what, free)| (vec![("of", (*what).to_owned())], float(*free))).collect();
        let mut metrics = vec![
            gauge("lifeboat_build", "The program", info),
            gauge("lifeboat_free_bytes", "Free space where the repository and the state folder lie", free),
        ];
        metrics.extend(repository(&looked.points, looked.cache));
        metrics.extend(machines(&looked.points));
        metrics.extend(jobs(&looked.running, &looked.totals));
        metrics.extend(recoveries(&looked.recoveries));
        metrics.extend(policies(&looked.schedules));
        House(metrics)
    }
}

fn gauge(name: &'static str, help: &'static str, values: Vec<(Labels, f64)>) -> Metric {
    Metric { name, help, kind: Kind::Gauge, values }
}

fn counter(name: &'static str, help: &'static str, values: Vec<(Labels, f64)>) -> Metric {
    Metric { name, help, kind: Kind::Counter, values }
}

#[expect(clippy::cast_precision_loss, reason = "metrics are floating point numbers")]
fn float(value: u64) -> f64 {
    value as f64
}

#[expect(clippy::cast_precision_loss, reason = "metrics are floating point numbers")]
fn seconds(time: chrono::DateTime<chrono::Utc>) -> f64 {
    time.timestamp_millis() as f64 / 1000.0
}

/// When a drill began, as its summary says.
fn seconds_of(drill: &serde_json::Value) -> Option<f64> {
    let time = chrono::DateTime::parse_from_rfc3339(drill["time"].as_str()?).ok()?;
    Some(seconds(time.to_utc()))
}

fn repository(points: &[Arc<PointSummary>], cache: Option<CacheUse>) -> [Metric; 3] {
    let sum =
        |value: fn(&PointSummary) -> u64| points.iter().fold(0_u64, |sum, point| sum.saturating_add(value(point)));
    let (size, stored) = (sum(|point| point.size), sum(|point| point.stored));
    let ratio = (stored > 0).then(|| (Vec::new(), float(size) / float(stored)));
    let used = cache.into_iter().flat_map(|cache| {
        [("used", cache.used), ("room", cache.capacity)].map(|(of, bytes)| (vec![("of", of.to_owned())], float(bytes)))
    });
    let fetched = cache.map(|cache| (Vec::new(), float(cache.fetched)));
    [
        gauge(
            "lifeboat_dedup_ratio",
            "Bytes of the disks of all points for each byte that was stored for them",
            ratio.into_iter().collect(),
        ),
        gauge(
            "lifeboat_cache_bytes",
            "Memory for decoded chunks: what is used, and what there is room for",
            used.collect(),
        ),
        counter(
            "lifeboat_cache_fetched_chunks",
            "Chunks that were not in memory when they were wanted",
            fetched.into_iter().collect(),
        ),
    ]
}

fn machines(points: &[Arc<PointSummary>]) -> [Metric; 8] {
    #[derive(Default)]
    struct Machine<'a> {
        points: u64,
        stored: u64,
        newest: Option<&'a PointSummary>,
        verified: Option<f64>,
        drill: Option<&'a serde_json::Value>,
        recovery_ms: Option<u64>,
    }
    let mut machines: BTreeMap<&str, Machine> = BTreeMap::new();
    for point in points {
        let machine = machines.entry(&point.machine).or_default();
        machine.points += 1;
        machine.stored += point.stored;
        if machine.newest.as_ref().is_none_or(|newest| newest.time <= point.time) {
            machine.newest = Some(point);
        }
        // Points stand in the order of their times.
        machine.drill = point.drill.as_ref().or(machine.drill);
        if point.came_up() == Some(true) {
            machine.verified = Some(machine.verified.unwrap_or(0.0).max(seconds(point.time)));
            let recovery = point.drill.as_ref().and_then(|drill| drill["rto_ms"].as_u64());
            machine.recovery_ms = recovery.or(machine.recovery_ms);
        }
    }
    let each = |value: &dyn Fn(&Machine) -> Option<f64>| {
        let values = machines
            .iter()
            .filter_map(|(name, machine)| Some((vec![("machine", (*name).to_owned())], value(machine)?)));
        values.collect::<Vec<_>>()
    };
    [
        gauge("lifeboat_machine_points", "Recovery points of a machine", each(&|machine| Some(float(machine.points)))),
        gauge(
            "lifeboat_machine_stored_bytes",
            "Bytes that the points of a machine have added to the repository",
            each(&|machine| Some(float(machine.stored))),
        ),
        gauge(
            "lifeboat_machine_size_bytes",
            "Bytes of a machine's disks, at its newest point",
            each(&|machine| machine.newest.as_ref().map(|newest| float(newest.size))),
        ),
        gauge(
            "lifeboat_machine_newest_point_timestamp_seconds",
            "When the newest point of a machine was made",
            each(&|machine| machine.newest.as_ref().map(|newest| seconds(newest.time))),
        ),
        gauge(
            "lifeboat_machine_newest_verified_point_timestamp_seconds",
            "When the newest point of a machine was made that a drill has booted",
            each(&|machine| machine.verified),
        ),
        gauge(
            "lifeboat_machine_drill_passed",
            "Whether the newest point of a machine that was drilled came up",
            each(&|machine| Some(if machine.drill?["result"] == "passed" { 1.0 } else { 0.0 })),
        ),
        gauge(
            "lifeboat_machine_drill_timestamp_seconds",
            "When that drill began",
            each(&|machine| seconds_of(machine.drill?)),
        ),
        gauge(
            "lifeboat_machine_recovery_seconds",
            "The measured recovery time of the newest point that came up",
            each(&|machine| Some(float(machine.recovery_ms?) / 1000.0)),
        ),
    ]
}

fn jobs(running: &[JobView], totals: &BTreeMap<(String, &'static str), Totals>) -> [Metric; 4] {
    let mut kinds: BTreeMap<&str, u64> = BTreeMap::new();
    for job in running {
        *kinds.entry(&job.kind).or_default() += 1;
    }
    let now = kinds.into_iter().map(|(kind, count)| (vec![("kind", kind.to_owned())], float(count))).collect();
    let each = |value: fn(&Totals) -> f64| {
        let values = totals.iter().map(|((kind, result), totals)| {
            (vec![("kind", kind.clone()), ("result", (*result).to_owned())], value(totals))
        });
        values.collect::<Vec<_>>()
    };
    let bytes = totals.iter().flat_map(|((kind, result), totals)| {
        [("read", totals.read), ("stored", totals.stored)].map(|(direction, bytes)| {
            let labels =
                vec![("kind", kind.clone()), ("result", (*result).to_owned()), ("direction", direction.to_owned())];
            (labels, float(bytes))
        })
    });
    [
        gauge("lifeboat_jobs_running", "Jobs at work", now),
        counter("lifeboat_jobs", "Jobs that have ended since the start", each(|totals| float(totals.count))),
        counter("lifeboat_job_seconds", "How long they took", each(|totals| totals.seconds)),
        counter("lifeboat_job_bytes", "Bytes that they read from sources, and stored", bytes.collect()),
    ]
}

fn recoveries(views: &[RecoveryView]) -> [Metric; 6] {
    let mut states: BTreeMap<String, u64> = BTreeMap::new();
    for view in views {
        let state = serde_json::to_value(view.state).ok().and_then(|state| Some(state.as_str()?.to_owned()));
        *states.entry(state.unwrap_or_default()).or_default() += 1;
    }
    let states = states.into_iter().map(|(state, count)| (vec![("state", state)], float(count))).collect();
    let copying = |value: fn(&RehydrationView) -> u64| {
        let values = views
            .iter()
            .filter_map(|view| Some((vec![("recovery", view.name.clone())], float(value(view.rehydration.as_ref()?)))));
        values.collect::<Vec<_>>()
    };
    let disks = |value: fn(&crate::recovery::DiskView) -> u64| {
        let values = views.iter().flat_map(|view| {
            view.disks.iter().map(move |disk| {
                (vec![("recovery", view.name.clone()), ("disk", disk.name.clone())], float(value(disk)))
            })
        });
        values.collect::<Vec<_>>()
    };
    [
        gauge("lifeboat_recoveries", "Recoveries by state", states),
        gauge("lifeboat_recovery_disk_bytes", "Size of a recovery's disk", disks(|disk| disk.size)),
        gauge(
            "lifeboat_recovery_hydrated_bytes",
            "Bytes of it that are on production storage",
            disks(|disk| disk.hydrated),
        ),
        gauge(
            "lifeboat_recovery_rehydration_bytes_per_second",
            "How fast it is moved to production storage",
            copying(|rehydration| rehydration.rate),
        ),
        gauge(
            "lifeboat_recovery_rehydration_left_bytes",
            "What is still to be moved",
            copying(|rehydration| rehydration.left),
        ),
        gauge("lifeboat_recovery_overlay_bytes", "Bytes that its guest has written", disks(|disk| disk.overlay)),
    ]
}

fn policies(views: &[ScheduleView]) -> [Metric; 3] {
    let each = |value: fn(&ScheduleView) -> Option<f64>| {
        let values = views.iter().filter_map(|view| Some((vec![("policy", view.name.clone())], value(view)?)));
        values.collect::<Vec<_>>()
    };
    [
        gauge(
            "lifeboat_policy_last_run_good",
            "Whether the last run of a policy went well; absent while it runs",
            each(|view| match view.last.as_ref()?.result {
                RunResult::Running => None,
                RunResult::Done => Some(1.0),
                RunResult::Failed | RunResult::Interrupted => Some(0.0),
            }),
        ),
        gauge(
            "lifeboat_policy_last_run_timestamp_seconds",
            "When the last run of a policy began",
            each(|view| Some(seconds(view.last.as_ref()?.started))),
        ),
        gauge(
            "lifeboat_policy_next_run_timestamp_seconds",
            "When the next run of a policy begins",
            each(|view| Some(seconds(view.next?))),
        ),
    ]
}

impl Collector for House {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        for Metric { name, help, kind, values } in &self.0 {
            let kind_of = if *kind == Kind::Counter { MetricType::Counter } else { MetricType::Gauge };
            let mut metric = encoder.encode_descriptor(name, help, None, kind_of)?;
            for (labels, value) in values {
                let labels = labels.as_slice();
                let family = metric.encode_family(&labels)?;
                match kind {
                    Kind::Counter => ConstCounter::new(*value).encode(family)?,
                    Kind::Gauge => ConstGauge::new(*value).encode(family)?,
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::{TimeDelta, Utc};
    use serde_json::json;

    fn point(machine: &str, age_hours: i64, drill: Option<&str>) -> PointSummary {
        PointSummary {
            id: "ab".repeat(32),
            machine: machine.into(),
            time: Utc::now() - TimeDelta::hours(age_hours),
            disks: Vec::new(),
            size: 1000,
            stored: 10,
            labels: BTreeMap::new(),
            consistency: "crash".into(),
            protected: false,
            protected_until: None,
            protection_damaged: false,
            drill: drill.map(|result| json!({ "result": result, "rto_ms": 4200, "time": "2026-11-21T06:00:00Z" })),
            damaged: None,
        }
    }

    fn text(looked: &Looked) -> String {
        crate::statistics::metrics(Vec::new(), House::of(looked)).unwrap()
    }

    #[test]
    fn machines_are_told_with_the_age_of_their_newest_and_their_newest_verified_point() {
        let points = [("web01", 30, Some("passed")), ("web01", 6, Some("failed")), ("db01", 1, None)];
        let points = points.map(|(machine, age, drill)| Arc::new(point(machine, age, drill))).to_vec();
        let (verified, newest) = (seconds(points[0].time), seconds(points[1].time));
        let text = text(&Looked { points, ..Looked::default() });
        for line in [
            "lifeboat_machine_points{machine=\"web01\"} 2.0".to_owned(),
            "lifeboat_machine_stored_bytes{machine=\"web01\"} 20.0".to_owned(),
            format!("lifeboat_machine_newest_point_timestamp_seconds{{machine=\"web01\"}} {newest:?}"),
            format!("lifeboat_machine_newest_verified_point_timestamp_seconds{{machine=\"web01\"}} {verified:?}"),
            "lifeboat_machine_drill_passed{machine=\"web01\"} 0.0".to_owned(),
            "lifeboat_machine_drill_timestamp_seconds{machine=\"web01\"} 1795240800.0".to_owned(),
            "lifeboat_machine_recovery_seconds{machine=\"web01\"} 4.2".to_owned(),
            "lifeboat_dedup_ratio{} 100.0".to_owned(),
        ] {
            assert!(text.contains(&line), "{line} is not in {text}");
        }
        assert!(!text.contains("verified_point_timestamp_seconds{machine=\"db01\"}"), "{text}");
    }

    #[test]
    fn the_dashboard_asks_for_nothing_that_is_not_told() {
        let dashboard = include_str!("../../docs/guide/grafana.json");
        serde_json::from_str::<serde_json::Value>(dashboard).expect("JSON");
        let told = text(&Looked::default());
        let mut names = 0;
        for (at, _) in dashboard.match_indices("lifeboat_") {
            let name: String = dashboard[at..].chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
            let plain = ["_total", "_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            let known = |name: &str| told.contains(&format!("# TYPE {name} "));
            assert!(known(&name) || plain.is_some_and(known), "{name}");
            names += 1;
        }
        assert!(names > 10);
    }
}
