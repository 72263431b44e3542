//! The service as strangers meet it: over the network, with a foreign client.

use std::fs;
use std::net::TcpStream;
use std::process::Output;

use lifeboat_tests::{Running, Sandbox, have, tool, tool_output, wait_until};
use serde_json::Value;

/// What a body is, for curl.
const JSON: &str = "Content-Type: application/json";

/// A place with one recovery point of `web01`, served.
struct Served {
    sandbox: Sandbox,
    service: Running,
    url: String,
}

impl Served {
    fn new(args: &[&str]) -> Served {
        let sandbox = Sandbox::with_plain_repository("64K");
        fs::write(sandbox.path("disk.raw"), vec![7; 1 << 20]).expect("room for a disk");
        sandbox.ok(&["backup", "web01", &sandbox.name("disk.raw")]);
        Served::in_place(sandbox, args)
    }

    fn in_place(sandbox: Sandbox, args: &[&str]) -> Served {
        let service = sandbox.start(&[&["serve", "--listen", "127.0.0.1:0"], args].concat());
        let url = service.line();
        wait_until("the socket answers too", || sandbox.path("state/lifeboat.sock").exists());
        Served { sandbox, service, url }
    }

    fn token(&self, args: &[&str]) -> String {
        self.sandbox.ok(&[&["token", "create"], args].concat()).trim().to_owned()
    }

    /// The status and the body of an answer.
    fn ask(&self, token: Option<&str>, args: &[&str], path: &str) -> (u16, String) {
        let ca = self.sandbox.name("state/tls/ca-cert.pem");
        let header = format!("Authorization: Bearer {}", token.unwrap_or_default());
        let mut all = vec!["--cacert", &ca, "--silent", "--show-error", "--write-out", "\n%{http_code}"];
        if token.is_some() {
            all.extend(["--header", &header]);
        }
        all.extend(args);
        let url = format!("{}{path}", self.url);
        all.push(&url);
        answer(&tool_output("curl", &all))
    }
}

fn answer(output: &Output) -> (u16, String) {
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr).into_owned();
    let (body, status) = said.rsplit_once('\n').unwrap_or_else(|| panic!("curl says nothing: {complained}"));
    (status.parse().expect("a status"), format!("{body}{complained}"))
}

#[test]
fn a_token_opens_the_network_door_as_far_as_its_role_goes() {
    if !have(&["curl"]) {
        return;
    }
    let mut served = Served::new(&[]);
    assert!(served.url.starts_with("https://127.0.0.1:"), "{}", served.url);
    let viewer = served.token(&["grafana", "--role", "viewer", "--expires", "90d"]);
    let operator = served.token(&["web", "--role", "operator", "--machine", "web01"]);
    let points = "/api/v1/points";
    let (status, said) = served.ask(None, &[], points);
    assert!(status == 401 && said.contains("token create"), "{said}");
    let (status, said) = served.ask(Some("lbt_0_0"), &[], points);
    assert_eq!(status, 401, "{said}");
    for token in [&viewer, &operator] {
        let (status, said) = served.ask(Some(token), &[], points);
        assert!(status == 200 && said.contains("\"machine\":\"web01\""), "{said}");
        assert_eq!(served.ask(Some(token), &["-X", "DELETE"], "/api/v1/points/web01?newest=true").0, 403);
    }
    let (status, said) =
        served.ask(Some(&operator), &["-X", "PUT", "-H", JSON, "--data", "{}"], "/api/v1/points/web01/protection");
    assert_eq!(status, 200, "{said}");
    assert_eq!(
        served.ask(Some(&viewer), &["-X", "PUT", "-H", JSON, "--data", "{}"], "/api/v1/points/web01/protection").0,
        403
    );
    assert_eq!(served.ask(Some(&viewer), &[], "/metrics").0, 200);
    let (status, said) = served.ask(None, &[], "/healthz");
    assert!(status == 200 && !said.contains("repo"), "{said}");
    // What is not understood is a problem document too.
    for (status, args, path) in [
        (404, &[][..], "/nothing"),
        (405, &["-X", "PATCH"], points),
        (415, &["-X", "POST", "--data", "{}"], "/api/v1/files/list"),
        (422, &["-X", "POST", "-H", JSON, "--data", "{\"spec\":7}"], "/api/v1/files/list"),
        (400, &["-X", "POST", "-H", JSON, "--data", "{"], "/api/v1/files/list"),
        (400, &[], "/api/v1/jobs/first"),
    ] {
        let (found, said) = served.ask(Some(&operator), args, path);
        let problem: serde_json::Value = serde_json::from_str(&said).unwrap_or_else(|_| panic!("{path}: {said}"));
        assert_eq!((found, problem["status"].as_u64()), (status, Some(u64::from(status))), "{path}: {said}");
    }
    let large = served.sandbox.path("large.json");
    fs::write(&large, format!("{{\"spec\":\"{}\"}}", "x".repeat(16 << 20))).unwrap();
    let (status, said) = served.ask(
        Some(&operator),
        &["-X", "POST", "-H", JSON, "--data", &format!("@{}", large.display())],
        "/api/v1/files/list",
    );
    assert_eq!(status, 413, "{said}");

    // Nobody but the one who made it has seen the secret.
    let secret = viewer.rsplit('_').next().unwrap();
    assert!(!served.sandbox.ok(&["token", "list"]).contains(secret));
    assert!(!fs::read_to_string(served.sandbox.path("state/tokens")).unwrap().contains(secret));
    served.sandbox.ok(&["token", "revoke", "grafana"]);
    assert_eq!(served.ask(Some(&viewer), &[], points).0, 401);
    assert!(served.service.stop().success());

    // Tokens and certificates outlive the service.
    let Served { sandbox, .. } = served;
    let served = Served::in_place(sandbox, &[]);
    assert_eq!(served.ask(Some(&operator), &[], points).0, 200);
    assert_eq!(served.ask(Some(&viewer), &[], points).0, 401);
}

#[test]
fn with_client_certificates_a_token_alone_opens_nothing() {
    if !have(&["curl"]) {
        return;
    }
    let sandbox = Sandbox::with_plain_repository("64K");
    let pki = sandbox.name("pki");
    sandbox.ok(&["tls", &pki, "--host", "localhost,127.0.0.1", "--host", "client.example"]);
    let folder = format!("{pki}/localhost");
    let served = Served::in_place(sandbox, &["--tls-dir", &folder, "--client-certificates"]);
    let token = served.token(&["ci", "--role", "viewer"]);
    let header = format!("Authorization: Bearer {token}");
    let url = format!("{}/api/v1/points", served.url);
    let (ca, own) = (format!("{pki}/ca-cert.pem"), format!("{pki}/client.example"));
    let (certificate, key) = (format!("{own}/client-cert.pem"), format!("{own}/client-key.pem"));
    let usual =
        ["--cacert", &ca, "--silent", "--show-error", "--write-out", "\n%{http_code}", "--header", &header, &url];
    let refused = tool_output("curl", &usual);
    assert!(!refused.status.success(), "answered without a client certificate");
    let with = [&["--cert", certificate.as_str(), "--key", key.as_str()], &usual[..]].concat();
    assert_eq!(answer(&tool_output("curl", &with)), (200, "[]".to_owned()));
}

#[test]
fn http_without_tls_is_for_loopback_and_has_to_be_asked_for() {
    if !have(&["curl"]) {
        return;
    }
    let served = Served::new(&["--insecure-http"]);
    assert!(served.url.starts_with("http://127.0.0.1:"), "{}", served.url);
    let token = served.token(&["ci", "--role", "viewer"]);
    assert_eq!(served.ask(Some(&token), &[], "/api/v1/points").0, 200);
    // Who says nothing keeps nobody from being answered, and the service from nothing when it ends.
    let address = served.url.strip_prefix("http://").unwrap();
    let silent: Vec<TcpStream> = (0..200).map(|_| TcpStream::connect(address).unwrap()).collect();
    assert_eq!(served.ask(Some(&token), &[], "/api/v1/points").0, 200);
    let Served { sandbox, mut service, .. } = served;
    assert!(service.stop().success());
    drop(silent);
    let complaint = sandbox.fails(5, &["serve", "--listen", "0.0.0.0:0", "--insecure-http"]);
    assert!(complaint.contains("loopback"), "{complaint}");
    sandbox.fails(2, &["serve", "--insecure-http"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    sandbox.fails(5, &["serve", "--listen", &taken.local_addr().unwrap().to_string()]);
    sandbox.fails(4, &["serve", "--listen", "127.0.0.1:0", "--tls-dir", &sandbox.name("nothing")]);
}

#[test]
fn the_audit_log_says_who_has_changed_what_and_that_nobody_changed_it() {
    if !have(&["curl"]) {
        return;
    }
    let served = Served::new(&["--insecure-http"]);
    let token = served.token(&["ci", "--role", "operator"]);
    let (status, _) =
        served.ask(Some(&token), &["-X", "PUT", "-H", JSON, "--data", "{}"], "/api/v1/points/web01/protection");
    assert_eq!(status, 200);
    let (status, _) = served.ask(Some(&token), &["-X", "DELETE"], "/api/v1/recoveries/nothing");
    assert_eq!(status, 404);
    assert_eq!(served.ask(Some(&token), &[], "/api/v1/audit").0, 403);
    let sandbox = &served.sandbox;
    let records = sandbox.json(&["audit", "list"]);
    let records = records.as_array().unwrap();
    let find = |what: &str| {
        let asked =
            records.iter().find(|record| record["what"] == what).unwrap_or_else(|| panic!("{what}: {records:?}"));
        let answer = records.iter().find(|record| record["asked"] == asked["number"]).unwrap();
        (
            asked["who"].as_str().unwrap(),
            answer["status"].as_u64().unwrap(),
            answer["about"].as_str().unwrap_or_default(),
        )
    };
    let (who, status, about) = find("POST /api/v1/tokens");
    assert!(who == "owner" && status == 201 && about.starts_with("token ci ("), "{about}");
    let (who, status, _) = find("PUT /api/v1/points/web01/protection");
    assert!(who.starts_with("token ci (") && status == 200, "{who}");
    let (_, status, about) = find("DELETE /api/v1/recoveries/nothing");
    assert!(status == 404 && about.contains("nothing"), "{about}");
    // The backup was made before there was a service.
    let (who, status, about) = find("POST /api/v1/points");
    assert!(who == "owner" && status == 202 && about == "job 1, backup of machine web01", "{about}");
    assert!(records.iter().any(|record| record["job"] == 1 && record["result"] == "done"), "{records:?}");

    let log = sandbox.path("state/audit");
    let text = fs::read_to_string(&log).unwrap();
    let secret = token.rsplit('_').next().unwrap();
    assert!(!text.contains(secret) && !text.contains("Bearer"), "a secret is in the audit log");
    let proof = sandbox.json(&["audit", "verify"]);
    assert_eq!((&proof["ok"], proof["records"].as_u64()), (&Value::Bool(true), Some(text.lines().count() as u64)));
    let head = proof["head"].as_str().unwrap().to_owned();
    sandbox.ok(&["token", "revoke", "ci"]);
    sandbox.ok(&["audit", "verify", "--head", &head]);
    fs::write(&log, text.replacen("/web01/", "/web02/", 1)).unwrap();
    assert!(sandbox.fails(3, &["audit", "verify"]).contains("not what was written"));
}

#[test]
fn a_configuration_is_checked_and_says_where_it_is_wrong() {
    let sandbox = Sandbox::with_plain_repository("64K");
    let file = sandbox.name("lifeboat.toml");
    let repository = sandbox.name("repo");
    let bare = |args: &[&str]| {
        let mut command = sandbox.command(args);
        command.env_remove("LIFEBOAT_REPO");
        command
    };
    fs::write(&file, format!("repository = \"{repository}\"\n[log]\nformat = \"json\"\n")).unwrap();
    let checked = bare(&["serve", "--config", &file, "--check"]).output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
    fs::write(&file, format!("repository = \"{repository}\"\n\n[listen]\nadress = \"127.0.0.1:0\"\n")).unwrap();
    let complaint = sandbox.command_fails(2, bare(&["serve", "--config", &file, "--check"]));
    assert!(complaint.contains("lifeboat.toml: line 4, key listen.adress: unknown field"), "{complaint}");
    fs::write(&file, "repository = \"/nowhere\"\n").unwrap();
    let complaint = sandbox.command_fails(2, bare(&["serve", "--config", &file, "--check"]));
    assert!(complaint.contains("line 1, key repository: there is no repository"), "{complaint}");
    sandbox.fails(4, &["serve", "--config", &sandbox.name("nothing")]);
}

#[test]
fn a_policy_backs_up_prunes_verifies_and_tells_of_what_fails() {
    let sandbox = Sandbox::with_plain_repository("64K");
    fs::write(sandbox.path("disk.raw"), vec![7; 1 << 20]).unwrap();
    let hook = sandbox.path("hook");
    fs::write(&hook, "#!/bin/sh\necho $LIFEBOAT_STAGE $LIFEBOAT_MACHINE $LIFEBOAT_RESULT >> \"$1\"\n").unwrap();
    let alert = sandbox.path("alert");
    fs::write(&alert, "#!/bin/sh\ncat >> \"$1\"\n").unwrap();
    for program in [&hook, &alert] {
        tool("chmod", &["755", program.to_str().unwrap()]);
    }
    let place = |name: &str| sandbox.name(name);
    let config = format!(
        "[listen]\naddress = \"127.0.0.1:0\"\ninsecure-http = true\n\
         [alerts]\ncommand = [\"{alert}\", \"{told}\"]\n\
         [policies.daily]\nschedule = \"0 2 * * *\"\nverify = \"100%\"\ncollect = true\n\
         before = [\"{hook}\", \"{hooked}\"]\nafter = [\"{hook}\", \"{hooked}\"]\n\
         [policies.daily.retention]\nkeep-last = 2\n\
         [policies.daily.machines.web01]\nsources = [\"{disk}\"]\n\
         [policies.broken]\nschedule = \"0 3 * * *\"\nretries = 1\nretry-delay = \"1s\"\n\
         [policies.broken.machines.db01]\nsources = [\"{missing}\"]\n",
        alert = place("alert"),
        told = place("told"),
        hook = place("hook"),
        hooked = place("hooked"),
        disk = place("disk.raw"),
        missing = place("missing.raw"),
    );
    let file = sandbox.name("lifeboat.toml");
    fs::write(&file, config).unwrap();
    let service = sandbox.start(&["serve", "--config", &file]);
    assert!(service.line().starts_with("http://127.0.0.1:"));
    wait_until("the socket answers too", || sandbox.path("state/lifeboat.sock").exists());
    for _ in 0..3 {
        let run = sandbox.json(&["schedule", "run", "daily"]);
        let steps = run["last"]["steps"].as_array().unwrap();
        let told: Vec<_> =
            steps.iter().map(|step| (step["what"].as_str().unwrap(), step["result"].as_str().unwrap())).collect();
        assert_eq!(told, [("backup", "done"), ("prune", "done"), ("verify", "done"), ("collect", "done")], "{run}");
    }
    assert_eq!(sandbox.json(&["points"]).as_array().unwrap().len(), 2, "the policy keeps two");
    let hooked = fs::read_to_string(sandbox.path("hooked")).unwrap();
    assert_eq!(hooked, "before web01\nafter web01 done\n".repeat(3));
    assert!(!sandbox.path("told").exists(), "nothing has failed yet");

    sandbox.fails(1, &["schedule", "run", "broken"]);
    wait_until("the alert is told", || fs::read_to_string(sandbox.path("told")).is_ok_and(|text| text.ends_with('}')));
    let told: Value = serde_json::from_str(&fs::read_to_string(sandbox.path("told")).unwrap()).unwrap();
    assert_eq!((&told["alert"], &told["policy"]), (&"run-failed".into(), &"broken".into()));
    assert!(told["details"][0].as_str().unwrap().contains("missing.raw"), "{told}");
    let views = sandbox.json(&["schedule", "list"]);
    let broken = views.as_array().unwrap().iter().find(|view| view["name"] == "broken").unwrap();
    assert_eq!(broken["last"]["steps"][0]["tries"], 2, "{views}");
    sandbox.fails(4, &["schedule", "run", "nothing"]);
    let records = sandbox.ok(&["audit", "list"]);
    assert!(records.contains("policy daily"), "{records}");

    // Killed in a run, it stands as interrupted; a restart knows the runs before.
    sandbox.kill_owner();
    drop(service);
    let service = sandbox.start(&["serve", "--config", &file]);
    // A command that came before the service had the folder would own it, and the service would be refused.
    assert!(service.line().starts_with("http://127.0.0.1:"));
    assert_eq!(sandbox.json(&["schedule", "list"]).as_array().map(Vec::len), Some(2));
    assert!(sandbox.ok(&["schedule", "list"]).contains("FAILED"));
}
