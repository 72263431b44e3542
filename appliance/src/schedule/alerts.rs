//! Tells a program and a webhook what somebody has to know: a run that failed, a machine without a fresh recovery point,
//! a file system with little room. What lasts is told when it begins, once a day while it lasts, and not again after.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use schemars::JsonSchema;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::policy::{AlertsConfig, Policy, Webhook, WebhookUrl};
use super::program;
use crate::app::App;
use crate::catalog::PointSummary;
use crate::drill::DrillReport;
use crate::problem::{Kind, Problem};

/// How long a program or webhook may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// How often a webhook is tried.
const TRIES: u32 = 3;
/// How often what lasts is told again.
const AGAIN: TimeDelta = TimeDelta::hours(24);
/// Where hosts keep the authorities they believe.
const AUTHORITIES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// What somebody has to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Alert {
    /// `run-failed`, `drill-failed`, `no-fresh-point` or `low-space`.
    pub alert: &'static str,
    /// The policy it is about.
    pub policy: Option<String>,
    /// The machine it is about.
    pub machine: Option<String>,
    /// For a person, in a line.
    pub title: String,
    /// More, a line each.
    pub details: Vec<String>,
    /// When.
    pub time: DateTime<Utc>,
}

impl Alert {
    /// A run failed.
    pub fn run_failed(policy: &str, failed: &[String]) -> Alert {
        Alert {
            alert: "run-failed",
            policy: Some(policy.to_owned()),
            machine: None,
            title: format!("policy {policy}: {} failed", crate::cli::count(failed.len() as u64, "step")),
            details: failed.to_vec(),
            time: Utc::now(),
        }
    }
}

impl Alert {
    /// A machine does not come up from its newest point.
    pub fn drill_failed(policy: &str, report: &DrillReport) -> Alert {
        let reason = report.reason.as_deref().unwrap_or_default();
        let shown = [("console", &report.console), ("screenshot", &report.screenshot)];
        let shown = shown.into_iter().filter_map(|(what, path)| Some(format!("{what}: {}", path.as_ref()?)));
        let tail = report.console_tail.iter().map(|line| format!("| {line}"));
        Alert {
            alert: "drill-failed",
            policy: Some(policy.to_owned()),
            machine: Some(report.machine.clone()),
            title: format!("machine {} does not come up, it reached {}: {reason}", report.machine, report.stage),
            details: [format!("recovery point: {}", report.point)].into_iter().chain(shown).chain(tail).collect(),
            time: Utc::now(),
        }
    }
}

/// Whom to tell.
#[derive(Debug, Default)]
pub struct Alerts {
    config: AlertsConfig,
    /// What lasts, and when it was told.
    told: Mutex<BTreeMap<String, DateTime<Utc>>>,
}

impl Alerts {
    /// Tells whom the configuration names.
    pub fn new(config: AlertsConfig) -> Alerts {
        Alerts { config, told: Mutex::default() }
    }

    /// Tells everybody. A failure is logged: there is nobody else to tell.
    pub async fn tell(&self, alert: &Alert) {
        tracing::error!(alert = alert.alert, title = alert.title, "alert");
        let json = serde_json::to_string(alert).unwrap_or_default();
        let of_command = async {
            let Some(command) = &self.config.command else { return };
            let environment = [
                ("LIFEBOAT_ALERT", alert.alert.to_owned()),
                ("LIFEBOAT_TITLE", alert.title.clone()),
                ("LIFEBOAT_POLICY", alert.policy.clone().unwrap_or_default()),
                ("LIFEBOAT_MACHINE", alert.machine.clone().unwrap_or_default()),
            ];
            if let Err(problem) = program::run("the alert's command", command, &environment, &json, DEADLINE).await {
                tracing::error!(%problem, "an alert was not told");
            }
        };
        let of_webhook = async {
            let Some(Webhook(url)) = &self.config.webhook else { return };
            for attempt in 1..=TRIES {
                match tokio::time::timeout(DEADLINE, post(url, &json)).await {
                    Ok(Ok(())) => return,
                    Ok(Err(problem)) => tracing::warn!(attempt, %problem, "an alert was not told"),
                    Err(_) => tracing::warn!(attempt, host = url.host, "the webhook does not answer"),
                }
                if attempt < TRIES {
                    tokio::time::sleep(Duration::from_secs(5)).await;
                }
            }
            tracing::error!(host = url.host, "an alert was not told by webhook");
        };
        tokio::join!(of_command, of_webhook);
    }

    /// Which of the conditions that hold now are to be told. The others are forgotten, so that they are told when they
    /// come again.
    fn due(&self, holding: &[(String, Alert)], now: DateTime<Utc>) -> Vec<Alert> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|key, _| holding.iter().any(|(holds, _)| holds == key));
        let mut due = Vec::new();
        for (key, alert) in holding {
            if told.get(key).is_none_or(|last| now - *last >= AGAIN) {
                told.insert(key.clone(), now);
                due.push(alert.clone());
            }
        }
        due
    }
}

/// Looks after machines and file systems once.
pub(super) async fn watch(
    alerts: &Alerts,
    policies: &BTreeMap<String, Arc<Policy>>,
    app: &Arc<App>,
    now: DateTime<Utc>,
) {
    let mut holding = Vec::new();
    if let Some(age) = alerts.config.stale_after {
        let listing = app.clone();
        let points = tokio::task::spawn_blocking(move || listing.points()).await;
        if let Ok(Ok(points)) = points {
            let newest = newest_verified(policies, &points).into_iter();
            holding.extend(newest.filter_map(|(machine, newest)| stale(machine, newest, age.0, now)));
        }
    }
    if let Some(room) = alerts.config.low_space {
        for (what, path) in [("the repository", app.location.as_path()), ("the state folder", app.state.root())] {
            if let Ok(stat) = rustix::fs::statvfs(path) {
                let free = stat.f_bavail.saturating_mul(stat.f_frsize);
                holding.extend((free < room.0).then(|| low(what, free, room.0, now)));
            }
        }
    }
    for alert in alerts.due(&holding, now) {
        alerts.tell(&alert).await;
    }
}

/// What is known of a machine that has to have fresh points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Newest {
    /// When its newest point was made that is trusted.
    time: Option<DateTime<Utc>>,
    /// Whether that is one which a drill has booted.
    drilled: bool,
}

/// The newest point of each machine of a policy, by what is known of it: of a machine that some policy drills, the newest
/// one that came up; of the others, the newest one that did not fail a drill.
fn newest_verified<'a>(
    policies: &'a BTreeMap<String, Arc<Policy>>,
    points: &'a [Arc<PointSummary>],
) -> BTreeMap<&'a str, Newest> {
    let drilled = |machine: &str| policies.values().any(|policy| policy.drills(machine));
    let begin = |machine: &str| Newest { time: None, drilled: drilled(machine) };
    // Each machine is judged once: there may be many points.
    let mut machines: BTreeMap<&str, Option<Newest>> =
        policies.values().flat_map(|policy| policy.named()).map(|machine| (machine, Some(begin(machine)))).collect();
    for point in points {
        let machine = point.machine.as_str();
        let covered = || policies.values().any(|policy| policy.covers(machine)).then(|| begin(machine));
        let Some(newest) = machines.entry(machine).or_insert_with(covered) else { continue };
        let counts = if newest.drilled { point.came_up() == Some(true) } else { point.came_up() != Some(false) };
        if counts {
            newest.time = newest.time.max(Some(point.time));
        }
    }
    machines.into_iter().filter_map(|(machine, newest)| Some((machine, newest?))).collect()
}

fn stale(machine: &str, newest: Newest, age: Duration, now: DateTime<Utc>) -> Option<(String, Alert)> {
    let limit = TimeDelta::from_std(age).unwrap_or(TimeDelta::MAX);
    let point = if newest.drilled { "recovery point that came up in a drill" } else { "recovery point" };
    let title = match newest.time {
        Some(time) if now - time <= limit => return None,
        Some(time) => {
            let hours = (now - time).num_hours();
            format!("machine {machine} has no fresh {point}: its newest is {hours} h old")
        }
        None => format!("machine {machine} has no {point}"),
    };
    let (policy, details) = (None, Vec::new());
    let alert = Alert { alert: "no-fresh-point", policy, machine: Some(machine.to_owned()), title, details, time: now };
    Some((format!("no-fresh-point {machine}"), alert))
}

fn low(what: &str, free: u64, limit: u64, now: DateTime<Utc>) -> (String, Alert) {
    let title = format!("{} are free where {what} lies", crate::cli::bytes(free));
    let details = vec![format!("less than {}", crate::cli::bytes(limit))];
    let alert = Alert { alert: "low-space", policy: None, machine: None, title, details, time: now };
    (format!("low-space {what}"), alert)
}

async fn post(url: &WebhookUrl, json: &str) -> Result<(), Problem> {
    let cannot = |error: &(dyn std::error::Error + 'static)| {
        Problem::failed(format!("cannot tell the webhook on {}", url.host), error)
    };
    let stream = TcpStream::connect((url.host.as_str(), url.port)).await.map_err(|error| cannot(&error))?;
    if !url.tls {
        return send(url, json, stream).await;
    }
    let name = ServerName::try_from(url.host.clone()).map_err(|error| cannot(&error))?;
    let tls = TlsConnector::from(Arc::new(believing()?));
    send(url, json, tls.connect(name, stream).await.map_err(|error| cannot(&error))?).await
}

/// A client that believes whom the host believes.
fn believing() -> Result<ClientConfig, Problem> {
    let path = AUTHORITIES.iter().find(|path| std::path::Path::new(path).exists());
    let path = path.ok_or_else(|| {
        Problem::new(Kind::Failed, "this host has no list of authorities").hint("install ca-certificates")
    })?;
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| Problem::failed(*path, &error))?;
    // One that cannot be read makes the others no worse.
    roots.add_parsable_certificates(certificates.flatten());
    let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Problem::failed("cannot speak TLS", &error))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

async fn send(
    url: &WebhookUrl,
    json: &str,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Result<(), Problem> {
    let cannot = |error: &(dyn std::error::Error + 'static)| {
        Problem::failed(format!("cannot tell the webhook on {}", url.host), error)
    };
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| cannot(&error))?;
    let connection = tokio::spawn(connection);
    let request = axum::http::Request::post(&url.path)
        .header("host", &url.host)
        .header("content-type", "application/json")
        .header("user-agent", "lifeboat")
        .body(Full::new(bytes::Bytes::copy_from_slice(json.as_bytes())))
        .map_err(|error| cannot(&error))?;
    let response = sender.send_request(request).await.map_err(|error| cannot(&error));
    connection.abort();
    match response?.status() {
        status if status.is_success() => Ok(()),
        status => Err(Problem::new(Kind::Failed, format!("the webhook on {} answers {status}", url.host))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lasts_is_told_once_a_day_and_when_it_comes_again() {
        let alerts = Alerts::default();
        let begin = Utc::now();
        let holding = [low("the repository", 1, 2, begin)];
        let due = |holding: &[(String, Alert)], hours| alerts.due(holding, begin + TimeDelta::hours(hours)).len();
        assert_eq!(due(&holding, 0), 1);
        assert_eq!(due(&holding, 1), 0);
        assert_eq!(due(&holding, 23), 0);
        assert_eq!(due(&holding, 24), 1);
        assert_eq!(due(&[], 25), 0);
        assert_eq!(due(&holding, 26), 1, "it came again");
    }

    #[test]
    fn a_machine_is_told_of_when_its_newest_point_is_old_or_missing() {
        let (now, day) = (Utc::now(), Duration::from_secs(24 * 3600));
        let newest = |hours| Newest { time: Some(now - TimeDelta::hours(hours)), drilled: false };
        assert!(stale("web01", newest(23), day, now).is_none());
        let (_, old) = stale("web01", newest(30), day, now).unwrap();
        assert!(old.title.contains("web01") && old.title.contains("30 h"), "{}", old.title);
        let (_, none) = stale("web01", Newest { time: None, drilled: true }, day, now).unwrap();
        assert!(none.title.contains("in a drill"), "{}", none.title);
    }

    #[test]
    fn of_a_machine_that_is_drilled_only_a_point_that_came_up_counts() {
        let policy = |text: &str| {
            let config: super::super::policy::PolicyConfig = toml::from_str(text).unwrap();
            Arc::new(config.policy("p").unwrap())
        };
        let daily = policy(
            "schedule = \"0 3 * * *\"\n[machines.web01]\nsources = [\"/a\"]\n[machines.db01]\nsources = [\"/b\"]\n\
             [libvirt]\ndomains = [\"vm-*\", \"mail\"]",
        );
        let drills = policy("schedule = \"0 5 * * 0\"\n[drill]\nmachines = [\"web*\"]");
        let policies = BTreeMap::from([("daily".to_owned(), daily), ("drills".to_owned(), drills)]);
        let now = Utc::now();
        let summary = |machine: &str, hours: i64, drill: Option<&str>| PointSummary {
            machine: machine.into(),
            time: now - TimeDelta::hours(hours),
            drill: drill.map(|result| serde_json::json!({ "result": result })),
            ..PointSummary::example()
        };
        let point = |machine: &str, hours: i64, drill: Option<&str>| Arc::new(summary(machine, hours, drill));
        let points = [
            point("web01", 50, Some("passed")),
            point("web01", 2, None),
            point("web01", 1, Some("failed")),
            point("db01", 9, None),
            point("db01", 1, Some("failed")),
            point("vm-7", 3, None),
            point("elsewhere", 3, None),
        ];
        let newest = newest_verified(&policies, &points);
        let told: Vec<_> = newest
            .iter()
            .map(|(machine, newest)| (*machine, newest.time.map(|time| (now - time).num_hours()), newest.drilled))
            .collect();
        let expected =
            [("db01", Some(9), false), ("mail", None, false), ("vm-7", Some(3), false), ("web01", Some(50), true)];
        assert_eq!(told, expected);
    }

    #[tokio::test]
    async fn a_webhook_gets_the_alert_as_json() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            let mut said = Vec::new();
            for answer in ["500 Internal Server Error", "204 No Content"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut text = String::new();
                while !text.contains("\r\n\r\n") || !text.ends_with('}') {
                    let mut buffer = [0; 4096];
                    let read = stream.read(&mut buffer).await.unwrap();
                    text.push_str(std::str::from_utf8(&buffer[..read]).unwrap());
                }
                stream.write_all(format!("HTTP/1.1 {answer}\r\ncontent-length: 0\r\n\r\n").as_bytes()).await.unwrap();
                said.push(text);
            }
            said
        });
        let url = WebhookUrl { tls: false, host: "127.0.0.1".into(), port, path: "/hook?key=x".into() };
        let json = serde_json::to_string(&Alert::run_failed("daily", &["backup of web01: no".into()])).unwrap();
        assert!(post(&url, &json).await.unwrap_err().title.contains("500"));
        post(&url, &json).await.unwrap();
        let said = server.await.unwrap();
        assert!(
            said[1].starts_with("POST /hook?key=x HTTP/1.1\r\n") && said[1].contains("\"alert\":\"run-failed\""),
            "{said:?}"
        );
    }
}
