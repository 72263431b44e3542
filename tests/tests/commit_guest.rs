//! `commit` of a recovery whose guest has an agent: file systems are frozen for the instant, and thawed whatever happens;
//! and commits that are made every so often.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use lifeboat_tests::{Console, Guest, Sandbox, guest, have, noise, wait_until};
use nbd_server::{BlockingClient, ClientOptions};
use serde_json::Value;

const MARK: &str = "state/recoveries/vm/guest-is-quiet";

/// A recovery `vm` of the guest that counts, which it does.
fn counting(sandbox: &Sandbox) -> (Value, Console) {
    sandbox.ok(&["backup", "vm", &guest(Guest::Counter).display().to_string(), "--memory", "512M"]);
    let view = sandbox.json(&["recover", "vm"]);
    let mut console = Console::new(view["console"].as_str().unwrap());
    console.wait_for("seq 3");
    (view, console)
}

fn goes_on(console: &mut Console) {
    let reached = console.last_number("seq ").unwrap();
    console.wait_for(&format!("seq {}", reached + 5));
}

/// The guest agent, talked to as anybody may.
struct Agent(BufReader<UnixStream>);

impl Agent {
    fn of(view: &Value) -> Agent {
        let socket = UnixStream::connect(view["guest_agent"].as_str().unwrap()).unwrap();
        socket.set_read_timeout(Some(lifeboat_tests::PATIENCE)).unwrap();
        let mut agent = Agent(BufReader::new(socket));
        agent.ask("{\"execute\":\"guest-sync\",\"arguments\":{\"id\":424242}}", "424242");
        agent
    }

    /// Says something and waits for an answer with `word` in it.
    fn ask(&mut self, what: &str, word: &str) {
        writeln!(self.0.get_mut(), "{what}").unwrap();
        let mut line = Vec::new();
        // What others have left unread comes first, and is not all text.
        while !String::from_utf8_lossy(&line).contains(word) {
            line.clear();
            assert!(self.0.read_until(b'\n', &mut line).unwrap() > 0, "the agent has gone");
        }
    }
}

fn connect(uri: &Value) -> BlockingClient {
    let options = ClientOptions { connect_timeout: Duration::from_secs(60), ..ClientOptions::default() };
    BlockingClient::connect(&uri.as_str().unwrap().parse().unwrap(), &options).unwrap()
}

fn points(sandbox: &Sandbox) -> usize {
    sandbox.json(&["points"]).as_array().unwrap().len()
}

#[test]
fn a_guest_with_an_agent_is_frozen_for_the_instant_and_its_point_boots_where_it_was() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let sandbox = Sandbox::with_repository();
    let (view, mut console) = counting(&sandbox);
    wait_until("the agent answers", || sandbox.json(&["commit", "vm"])["consistency"] == "application");
    let before = console.last_number("seq ").unwrap();
    let result = sandbox.json(&["commit", "vm", "--consistency", "application"]);
    let after = console.last_number("seq ").unwrap();
    assert_eq!((&result["consistency"], &result["why_crash"]), (&"application".into(), &Value::Null));
    let point = result["point"].as_str().unwrap().to_owned();
    assert_eq!(sandbox.json(&["show", &point])["consistency"], "application");
    assert!(!sandbox.path(MARK).exists());
    goes_on(&mut console);
    let commits = sandbox.json(&["recovery", "vm"])["commits"].clone();
    assert_eq!((&commits["last_point"], &commits["last_consistency"]), (&point.as_str().into(), &"application".into()));

    // Not asked, there or not: as after a power cut.
    let crash = sandbox.json(&["commit", "vm", "--consistency", "crash"]);
    assert_eq!(crash["consistency"], "crash");

    // Somebody else has the agent's channel: `auto` does without, `application` fails and keeps nothing.
    let agent = Agent::of(&view);
    let auto = sandbox.json(&["commit", "vm"]);
    assert_eq!(auto["consistency"], "crash");
    assert!(auto["why_crash"].as_str().unwrap().contains("does not answer"), "{auto}");
    let had = points(&sandbox);
    let said = sandbox.fails(5, &["commit", "vm", "--consistency", "application"]);
    assert!(said.contains("does not freeze") && said.contains("--consistency crash"), "{said}");
    assert_eq!((points(&sandbox), sandbox.path(MARK).exists()), (had, false));
    drop(agent);
    goes_on(&mut console);

    // Lifeboat is killed between the freeze and the thaw: what it finds when it is back is this.
    let mut agent = Agent::of(&view);
    fs::write(sandbox.path(MARK), "").unwrap();
    agent.ask("{\"execute\":\"guest-fsfreeze-freeze\"}", "return");
    drop(agent);
    sandbox.kill_owner();
    assert_eq!(sandbox.json(&["recovery", "vm"])["state"], "running");
    wait_until("the guest is thawed", || !sandbox.path(MARK).exists());
    goes_on(&mut console);
    sandbox.ok(&["discard", "vm"]);

    // The guest of the point has all it had said before the commit, and nothing that it said after it.
    let view = sandbox.json(&["recover", &point, "--name", "again"]);
    let mut console = Console::new(view["console"].as_str().unwrap());
    console.wait_for("files ok");
    let last = console.next_number("log ok last=");
    assert!((before..=after + 1).contains(&last), "{last} is not between {before} and {after}");
    console.wait_for("slots ok");
    assert!(console.next_number("seq ") > last);
    sandbox.ok(&["discard", "again"]);
    assert_eq!(sandbox.processes().len(), usize::from(sandbox.owner().is_some()));
}

#[test]
fn a_recovery_is_committed_every_so_often_if_something_was_written() {
    let sandbox = Sandbox::with_repository();
    let disk = sandbox.name("disk");
    fs::write(&disk, noise(1, 1 << 20)).unwrap();
    sandbox.ok(&["backup", "vm", &disk]);
    for bad in ["1s", "0", "2y", "often"] {
        sandbox.fails(2, &["recover", "vm", "--on", "none", "--commit-every", bad]);
    }
    let view = sandbox.json(&["recover", "vm", "--on", "none", "--commit-every", "5s"]);
    assert_eq!(view["commits"]["every_seconds"], 5);
    let client = connect(&view["disks"][0]["nbd_uri"]);
    client.write(0, &[7; 4096]).unwrap();
    wait_until("it is committed", || points(&sandbox) == 2);
    let shown = sandbox.json(&["recovery", "vm"])["commits"].clone();
    assert_eq!((&shown["last_consistency"], &shown["problem"]), (&"crash".into(), &Value::Null));

    // Nothing more is written: nothing more is made, whether or not Lifeboat still knows that.
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(points(&sandbox), 2);
    drop(client);
    sandbox.kill_owner();
    let view = sandbox.json(&["recovery", "vm"]);
    assert_eq!(view["commits"]["every_seconds"], 5, "{view}");
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(points(&sandbox), 2);
    let client = connect(&view["disks"][0]["nbd_uri"]);
    client.write(8192, &[8; 4096]).unwrap();
    wait_until("it is committed again", || points(&sandbox) == 3);

    // A failure is told, and it is tried again.
    let packs = sandbox.path("repo/packs");
    let aside = sandbox.path("aside");
    fs::rename(&packs, &aside).unwrap();
    fs::write(&packs, "in the way").unwrap();
    client.write(0, &noise(2, 4096)).unwrap();
    wait_until("the failure is told", || !sandbox.json(&["recovery", "vm"])["commits"]["problem"].is_null());
    assert!(sandbox.ok(&["recovery", "vm"]).contains("FAILED: "));
    fs::remove_file(&packs).unwrap();
    fs::rename(&aside, &packs).unwrap();
    wait_until("it is committed after all", || points(&sandbox) == 4);
    wait_until("and nothing is wrong", || sandbox.json(&["recovery", "vm"])["commits"]["problem"].is_null());

    let said = sandbox.ok(&["commit", "vm", "--every", "1h", "--label", "why=hourly"]);
    assert!(said.contains("every 1 h"), "{said}");
    assert!(sandbox.ok(&["commit", "vm", "--off"]).contains("only when asked for"));
    client.write(0, &noise(3, 4096)).unwrap();
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(points(&sandbox), 4);
    assert_eq!(sandbox.json(&["recovery", "vm"])["commits"]["every_seconds"], Value::Null);
    sandbox.ok(&["discard", "vm"]);
    sandbox.ok(&["restore", "vm", "--to", &sandbox.name("out")]);
    assert_eq!(fs::read(sandbox.path("out")).unwrap()[..4096], noise(2, 4096));
}
