//! Every operation, asked by nobody, by a role too small, by a role that is enough, and by somebody else's token.

use std::collections::BTreeSet;

use axum::body::Body;
use axum::http::header;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::*;
use crate::access::tokens::NewTokenRequest;
use crate::api::login::{Logins, Peer, identify};
use crate::app::{Encryption, Options, init};

/// A repository with one point, of the machine `theirs`.
pub struct Bench {
    pub app: Arc<App>,
    dir: tempfile::TempDir,
}

impl Bench {
    pub async fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            repository: Some(dir.path().join("repo").display().to_string()),
            state: dir.path().join("state"),
            passphrase_file: None,
            passphrase: None,
            key_file: None,
            cache: 1 << 20,
        };
        init(&options, 64 << 10, Encryption::None).unwrap();
        let app = App::open(&options, "test").unwrap();
        let bench = Bench { app, dir };
        let disk = bench.dir.path().join("disk.raw");
        std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
        let backup = json!({ "machine": "theirs", "sources": [{ "disk": "disk0", "location": disk }], "labels": {} });
        let (status, said) = bench.owner(Method::POST, "/api/v1/points", Some(backup)).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{said}");
        bench.app.jobs.get(1).unwrap().watch().wait_for(|now| *now != crate::jobs::Outcome::Running).await.unwrap();
        assert_eq!(bench.app.points().unwrap().len(), 1, "{:?}", bench.app.jobs.get(1).unwrap().view());
        bench
    }

    fn token(&self, role: Role, machines: Option<&str>) -> String {
        let name = format!("{}-{}", role.name(), machines.unwrap_or("all"));
        let machines = machines.map(|machine| BTreeSet::from([machine.to_owned()]));
        let request = NewTokenRequest { name, role, machines, expires: None };
        self.app.tokens.create(request, chrono::Utc::now()).unwrap().token
    }

    async fn owner(&self, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        ask(super::super::owners(&self.app), method, path, None, body).await
    }

    async fn network(
        &self,
        method: &Method,
        path: &str,
        token: Option<&str>,
        body: Option<Value>,
    ) -> (StatusCode, Value) {
        ask(super::super::strangers(&self.app), method.clone(), path, token, body).await
    }

    pub fn rows(&self) -> Vec<Row<Arc<App>>> {
        super::super::rows(&self.app)
    }
}

async fn ask(
    router: Router,
    method: Method,
    path: &str,
    token: Option<&str>,
    body: Option<Value>,
) -> (StatusCode, Value) {
    let mut request = Request::builder().method(method).uri(path).extension(Peer([192, 0, 2, 1].into()));
    if let Some(token) = token {
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
    }
    let body = match body {
        Some(body) => {
            request = request.header(header::CONTENT_TYPE, "application/json");
            Body::from(body.to_string())
        }
        None => Body::empty(),
    };
    let response = router.oneshot(request.body(body).unwrap()).await.unwrap();
    let status = response.status();
    // Streams without an end are not read.
    let bytes = match response.headers().get(header::CONTENT_TYPE).map(|kind| kind.as_bytes()) {
        Some(b"application/json" | b"application/problem+json") => {
            axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap()
        }
        _ => axum::body::Bytes::new(),
    };
    (status, serde_json::from_slice(&bytes).unwrap_or_default())
}

/// A path with something in the place of its parameters that does not exist.
fn nowhere(path: &str) -> String {
    path.replace("{id}", "999999")
        .split('/')
        .map(|part| if part.starts_with('{') { "nothing" } else { part })
        .collect::<Vec<_>>()
        .join("/")
}

#[tokio::test]
async fn every_operation_refuses_who_has_no_token_or_too_small_a_role() {
    let bench = Bench::new().await;
    let tokens = [Role::Viewer, Role::Operator, Role::Admin].map(|role| (role, bench.token(role, None)));
    let rows = bench.rows();
    assert!(rows.len() > 30, "where are the operations?");
    let public: Vec<&str> = rows.iter().filter(|row| row.need == Need::Nobody).map(|row| row.path).collect();
    assert_eq!(public, ["/healthz", "/readyz", "/openapi.json"], "whoever can connect may ask these");
    for row in &rows {
        let (name, path) = (format!("{} {}", row.method, row.path), nowhere(row.path));
        let Need::Role(needed) = row.need else { continue };
        let (status, said) = bench.network(&row.method, &path, None, None).await;
        assert_eq!((status, &said["status"]), (StatusCode::UNAUTHORIZED, &json!(401)), "{name} without a token");
        for (role, token) in &tokens {
            let (status, said) = bench.network(&row.method, &path, Some(token), None).await;
            if *role < needed {
                assert_eq!(status, StatusCode::FORBIDDEN, "{name} as {role:?}");
                assert!(said["title"].as_str().unwrap().contains(needed.name()), "{name} as {role:?}: {said}");
            } else {
                let refused = [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN, StatusCode::METHOD_NOT_ALLOWED];
                assert!(!refused.contains(&status), "{name} as {role:?}: {said}");
            }
        }
    }
}

/// What to ask of a judged operation so that it is about the machine `theirs`: its path, and its body.
fn about_theirs(row: &Row<Arc<App>>) -> (String, Option<Value>) {
    let place = json!({ "spec": "theirs:disk0", "recovery": null });
    let body = match (row.method.as_str(), row.path) {
        ("GET" | "DELETE", _) => None,
        ("PUT", "/api/v1/points/{point}/protection") => Some(json!({})),
        ("POST", "/api/v1/recoveries") => Some(json!({
            "point": "theirs", "on": "none", "memory": 1 << 28, "cpus": 1, "network": "none", "accel": "tcg",
            "firmware": "auto", "machine_type": "q35", "bus": "virtio-blk",
        })),
        ("POST", "/api/v1/drills") => Some(json!({ "points": ["theirs"] })),
        ("POST", "/api/v1/files/volumes") => Some(place),
        ("POST", "/api/v1/files/list") => Some(json!({ "spec": "theirs:disk0", "path": "/" })),
        ("POST", "/api/v1/files/find") => Some(json!({ "spec": "theirs:disk0", "glob": "*" })),
        ("POST", "/api/v1/files/versions") => Some(json!({ "machine": "theirs", "path": "/etc/fstab" })),
        ("POST", "/api/v1/files/tar") => Some(json!({ "places": [place] })),
        (method, path) => panic!("{method} {path} is Reach::Judged: say here how to ask it for the machine `theirs`"),
    };
    (row.path.replace("{point}", "theirs").replace("{id}", "1").replace("{name}", "theirs"), body)
}

#[tokio::test]
async fn who_is_limited_to_machines_gets_at_nothing_else() {
    let bench = Bench::new().await;
    let (stranger, friend) = (bench.token(Role::Admin, Some("mine")), bench.token(Role::Admin, Some("theirs")));
    for row in bench.rows().iter().filter(|row| row.need != Need::Nobody) {
        let name = format!("{} {}", row.method, row.path);
        match row.reach {
            Reach::Whole => {
                let (status, _) = bench.network(&row.method, &nowhere(row.path), Some(&friend), None).await;
                assert_eq!(status, StatusCode::FORBIDDEN, "{name}");
            }
            Reach::Recovery => {
                assert!(row.path.contains("{name}"), "{name} is Reach::Recovery and names none");
                let (status, _) = bench.network(&row.method, &nowhere(row.path), Some(&friend), None).await;
                assert_eq!(status, StatusCode::NOT_FOUND, "{name}");
            }
            Reach::Judged => {
                let (path, body) = about_theirs(row);
                let (status, said) = bench.network(&row.method, &path, Some(&stranger), body).await;
                if row.path == "/api/v1/events" {
                    // Its own test says what is told to whom.
                    assert_eq!(status, StatusCode::OK, "{name}");
                } else if row.method == Method::GET && !row.path.contains('{') {
                    assert_eq!((status, said), (StatusCode::OK, json!([])), "{name}");
                } else {
                    assert_eq!(status, StatusCode::NOT_FOUND, "{name}: {said}");
                }
            }
        }
    }
    let (status, said) = bench.network(&Method::GET, "/api/v1/points", Some(&friend), None).await;
    assert_eq!((status, said.as_array().unwrap().len()), (StatusCode::OK, 1));
    let (status, said) = bench.network(&Method::GET, "/api/v1/jobs/1", Some(&friend), None).await;
    assert_eq!((status, &said["machine"]), (StatusCode::OK, &json!("theirs")));
    let (status, _) = bench.network(&Method::DELETE, "/api/v1/points/theirs?newest=true", Some(&friend), None).await;
    assert_eq!(status, StatusCode::OK);
    assert!(bench.app.points().unwrap().is_empty());
}

#[tokio::test]
async fn a_recovery_is_shown_to_those_who_may_see_its_machine() {
    let bench = Bench::new().await;
    let (stranger, friend) = (bench.token(Role::Operator, Some("mine")), bench.token(Role::Operator, Some("theirs")));
    let post = Row::<Arc<App>>::post("/api/v1/recoveries", OPERATOR, Reach::Judged, || async {}).creates::<()>("");
    let (path, body) = about_theirs(&post);
    let (status, said) = bench.network(&Method::POST, &path, Some(&friend), body).await;
    assert_eq!(status, StatusCode::CREATED, "{said}");
    let of = "/api/v1/recoveries/theirs";
    let place = json!({ "spec": "disk0", "recovery": "theirs" });
    let volumes = "/api/v1/files/volumes";
    for (token, seen) in [(&stranger, false), (&friend, true)] {
        let (status, _) = bench.network(&Method::GET, of, Some(token), None).await;
        assert_eq!(status == StatusCode::OK, seen);
        let (_, said) = bench.network(&Method::GET, "/api/v1/recoveries", Some(token), None).await;
        assert_eq!(said.as_array().unwrap().len() == 1, seen);
        let (status, said) = bench.network(&Method::POST, volumes, Some(token), Some(place.clone())).await;
        assert_eq!(status == StatusCode::OK, seen, "{said}");
        let (status, _) = bench.network(&Method::DELETE, of, Some(token), None).await;
        assert_eq!(status == StatusCode::OK, seen);
    }
    bench.app.close().await;
}

#[tokio::test]
async fn an_address_with_too_many_wrong_tokens_is_not_listened_to() {
    let bench = Bench::new().await;
    let good = bench.token(Role::Viewer, None);
    let logins = Logins::new(bench.app.tokens.clone());
    let router = gated(bench.rows(), &bench.app).layer(axum::middleware::from_fn_with_state(logins, identify));
    let ask =
        |token: String| ask(router.clone(), Method::GET, "/api/v1/jobs", Some(Box::leak(token.into_boxed_str())), None);
    assert_eq!(ask(good.clone()).await.0, StatusCode::OK);
    for _ in 0..crate::access::throttle::FAILURES_MAX {
        assert_eq!(ask(format!("{good}0")).await.0, StatusCode::UNAUTHORIZED);
    }
    assert_eq!(ask(good).await.0, StatusCode::TOO_MANY_REQUESTS);
}

#[tokio::test]
async fn what_does_not_exist_is_a_problem_document() {
    let bench = Bench::new().await;
    let (status, said) = bench.owner(Method::GET, "/nothing", None).await;
    assert_eq!((status, &said["status"]), (StatusCode::NOT_FOUND, &json!(404)));
    let (status, said) = bench.owner(Method::PATCH, "/api/v1/points", None).await;
    assert_eq!((status, &said["status"]), (StatusCode::METHOD_NOT_ALLOWED, &json!(405)));
    let (status, said) = bench.network(&Method::GET, "/healthz", None, None).await;
    assert_eq!((status, said), (StatusCode::OK, json!({ "status": "ok" })));
}

#[tokio::test]
async fn events_are_told_to_those_who_may_see_what_they_are_about() {
    use futures_util::{FutureExt, StreamExt};
    let bench = Bench::new().await;
    let (stranger, friend) = (bench.token(Role::Viewer, Some("mine")), bench.token(Role::Viewer, Some("theirs")));
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let subject = crate::jobs::Subject::machine("theirs");
    bench.app.jobs.start("backup", subject, move |_| {
        let _ = wait.recv();
        Ok(Value::Null)
    });
    let listen = async |token: &str, last: Option<&str>| {
        let mut request = Request::get("/api/v1/events").extension(Peer([192, 0, 2, 1].into()));
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last);
        }
        let request = request.header(header::AUTHORIZATION, format!("Bearer {token}")).body(Body::empty()).unwrap();
        super::super::strangers(&bench.app).oneshot(request).await.unwrap().into_body().into_data_stream()
    };
    let (mut told, mut silent) = (listen(&friend, None).await, listen(&stranger, None).await);
    let next = async |told: &mut axum::body::BodyDataStream| {
        String::from_utf8(told.next().await.unwrap().unwrap().to_vec()).unwrap()
    };
    let begun = next(&mut told).await;
    assert!(begun.contains("\nevent: job\n") && begun.contains("\"state\":\"running\""), "{begun}");
    drop(release);
    let ended = next(&mut told).await;
    assert!(ended.contains("\"state\":\"done\""), "{ended}");
    assert!(silent.next().now_or_never().is_none(), "a stranger is told of it");

    // Who comes back is told what he has missed, and who was away for too long how all stands.
    let id = |event: &str| event.strip_prefix("id: ").unwrap().lines().next().unwrap().to_owned();
    let mut back = listen(&friend, Some(&id(&begun))).await;
    assert_eq!(next(&mut back).await, ended);
    let mut late = listen(&friend, Some("of-another-process-7")).await;
    assert!(next(&mut late).await.contains("\nevent: reset\n"));
    let (first, second) = (next(&mut late).await, next(&mut late).await);
    assert!(first.contains("\"id\":1,") && second.contains("\"id\":2,"), "all jobs: {first}{second}");
}

#[tokio::test]
async fn a_start_with_an_idempotency_key_is_done_once() {
    let bench = Bench::new().await;
    let disk = bench.dir.path().join("disk.raw");
    let body = json!({ "machine": "theirs", "sources": [{ "disk": "disk0", "location": disk }] });
    let token = bench.token(Role::Operator, None);
    let mut numbers = Vec::new();
    for key in ["one", "one", "two"] {
        let request = Request::post("/api/v1/points")
            .extension(Peer([192, 0, 2, 1].into()))
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .header(header::CONTENT_TYPE, "application/json")
            .header("Idempotency-Key", key);
        let request = request.body(Body::from(body.to_string())).unwrap();
        let response = super::super::strangers(&bench.app).oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::ACCEPTED);
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        numbers.push(serde_json::from_slice::<Value>(&bytes).unwrap()["id"].as_u64().unwrap());
    }
    assert_eq!(numbers, [2, 2, 3]);
}
