//! What must not cost a guest anything on its way back to production storage: Lifeboat dying at every step, a target that
//! fails, a repository that is away, a connection that is cut, and two who want the same. The guest is a client that
//! writes without a rest and repeats what was not answered, as QEMU does.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use lifeboat_tests::{
    Console, Doomed, Firmware, Foreign, Guest as Image, Machine, Random, Sandbox, guest as image, have, kill, noise,
    seed, wait_until,
};
use nbd_server::export::ZeroMode;
use nbd_server::wire::Errno;
use nbd_server::{BlockingClient, ClientError, ClientOptions, NbdUri};

const SIZE: usize = 4 << 20;

/// What a guest bears.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Patience {
    /// No request may fail.
    WithCuts,
    /// A request that fails is repeated.
    WithErrors,
}

/// A guest: what it was told is written, and a thread that writes more.
struct Guest {
    disk: Arc<Mutex<Vec<u8>>>,
    uri: String,
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

fn connect(uri: &str, stop: &AtomicBool) -> Option<BlockingClient> {
    let uri: NbdUri = uri.parse().unwrap();
    while !stop.load(Ordering::Relaxed) {
        match BlockingClient::connect(&uri, &ClientOptions::default()) {
            Ok(client) => return Some(client),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    None
}

impl Guest {
    fn start(uri: &str, disk: Vec<u8>, seed: u64) -> Guest {
        Guest::patient(uri, disk, seed, Patience::WithCuts)
    }

    fn patient(uri: &str, disk: Vec<u8>, seed: u64, patience: Patience) -> Guest {
        let disk = Arc::new(Mutex::new(disk));
        let (stop, written) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let thread = {
            let (disk, stop, written, uri) = (disk.clone(), stop.clone(), written.clone(), uri.to_owned());
            std::thread::spawn(move || {
                let (mut random, mut client) = (Random::new(seed), None);
                while !stop.load(Ordering::Relaxed) {
                    let mut disk = disk.lock().unwrap();
                    Guest::step(&uri, &mut disk, &mut random, &mut client, patience, &stop);
                    written.fetch_add(1, Ordering::Relaxed);
                    drop(disk);
                    std::thread::sleep(Duration::from_micros(200));
                }
            })
        };
        Guest { disk, uri: uri.to_owned(), stop, written, thread: Some(thread) }
    }

    /// One change, repeated until it is answered.
    fn step(
        uri: &str,
        disk: &mut [u8],
        random: &mut Random,
        client: &mut Option<BlockingClient>,
        patience: Patience,
        stop: &AtomicBool,
    ) {
        let most = if random.once_in(8) { 200_000 } else { 9_000 };
        let length = 1 + random.below(most);
        let offset = random.below(SIZE as u64 - length);
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
        let kind = random.below(8);
        let data = if kind == 0 { vec![0; range.len()] } else { noise(random.number(), range.len()) };
        loop {
            let Some(connected) = client.take().or_else(|| connect(uri, stop)) else { return };
            let answer = match kind {
                0 => connected.write_zeroes(offset, length, ZeroMode::MayPunch).and_then(|()| connected.flush()),
                1..=4 => connected.write_durable(offset, &data),
                _ => connected.write(offset, &data).and_then(|()| connected.flush()),
            };
            match answer {
                Ok(()) => {
                    disk[range].copy_from_slice(&data);
                    *client = Some(connected);
                    return;
                }
                Err(ClientError::Lost(_)) => {}
                Err(ClientError::Server(Errno::Shutdown)) => {}
                // QEMU holds the guest and repeats the request.
                Err(ClientError::Server(Errno::Io)) if patience == Patience::WithErrors => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => panic!("the guest is told: {error}"),
            }
        }
    }

    /// Holds the guest and compares all it was told with what there is.
    fn check(&self, when: &str) {
        let disk = self.disk.lock().unwrap();
        let client = connect(&self.uri, &self.stop).unwrap();
        let mut found = vec![0; SIZE];
        client.read(0, &mut found).unwrap_or_else(|error| panic!("{when}: {error}"));
        compare(&found, &disk, when);
    }

    /// Lets it write some more.
    fn go_on(&self) {
        let before = self.written.load(Ordering::Relaxed);
        wait_until("the guest writes", || self.written.load(Ordering::Relaxed) > before + 5);
    }

    fn hold(&self) -> MutexGuard<'_, Vec<u8>> {
        self.disk.lock().unwrap()
    }

    /// Ends it; returns what its disk holds.
    fn end(mut self) -> Vec<u8> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        std::mem::take(&mut self.disk.lock().unwrap())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn compare(found: &[u8], wanted: &[u8], when: &str) {
    let differs = found.iter().zip(wanted).position(|(a, b)| a != b);
    assert_eq!((found.len(), differs), (wanted.len(), None), "{when}");
}

/// A machine's only disk, backed up.
fn backed_up() -> (Sandbox, Vec<u8>) {
    let sandbox = Sandbox::with_plain_repository("16K");
    let mut disk = noise(21, SIZE);
    disk[SIZE / 2..SIZE / 2 + 500_000].fill(0);
    fs::write(sandbox.path("disk.raw"), &disk).unwrap();
    sandbox.ok(&["backup", "vm", &sandbox.name("disk.raw")]);
    (sandbox, disk)
}

fn published() -> (Sandbox, Vec<u8>, String) {
    let (sandbox, disk) = backed_up();
    let view = sandbox.json(&["recover", "vm", "--on", "none"]);
    let uri = view["disks"][0]["nbd_uri"].as_str().unwrap().to_owned();
    (sandbox, disk, uri)
}

fn state(sandbox: &Sandbox) -> String {
    sandbox.json(&["recovery", "vm"])["state"].as_str().unwrap().to_owned()
}

#[test]
fn lifeboat_may_die_before_and_after_every_record_of_its_journal() {
    let seed = seed();
    let (sandbox, disk) = backed_up();
    let target = sandbox.name("production.raw");
    let recover = ["recover", "vm", "--on", "none"];
    // What it was about to do, by the record; and the states that it may be found in afterwards.
    for (moment, record) in [("before", "created"), ("after", "created"), ("before", "running"), ("after", "running")] {
        let point = format!("{moment}:\"{record}\"");
        let doomed = Doomed::start(&sandbox, &point);
        assert!(!sandbox.run(&recover).status.success());
        doomed.wait(&point);
        let found = sandbox.json(&["recoveries"]);
        match (moment, record) {
            ("before", "created") => assert!(found.as_array().unwrap().is_empty(), "{found}"),
            ("after", "running") => assert_eq!(found[0]["state"], "running"),
            _ => {
                assert_eq!(found[0]["state"], "failed", "{point}");
                assert!(sandbox.fails(5, &recover).contains("exists already"));
                sandbox.ok(&["discard", "vm"]);
            }
        }
    }
    let uri = sandbox.json(&["recovery", "vm"])["disks"][0]["nbd_uri"].as_str().unwrap().to_owned();
    let guest = Guest::start(&uri, disk, seed);
    move_through_crashes(&sandbox, &target, |point| {
        guest.go_on();
        guest.check(&format!("seed {seed}: {point}"));
    });
    assert_eq!(state(&sandbox), "cut-over");
    guest.go_on();
    guest.check(&format!("seed {seed}: at the end"));
    for moment in ["before", "after"] {
        let disk = guest.hold();
        let point = format!("{moment}:\"discarding\"");
        let doomed = Doomed::start(&sandbox, &point);
        let _ = sandbox.run(&["discard", "vm"]);
        doomed.wait(&point);
        compare(&fs::read(&target).unwrap(), &disk, &format!("seed {seed}: {point}"));
        if moment == "before" {
            assert_eq!(state(&sandbox), "cut-over");
        }
    }
    assert!(sandbox.json(&["recoveries"]).as_array().unwrap().is_empty());
    assert!(!sandbox.path("state/recoveries/vm").exists());
    let disk = guest.end();
    compare(&fs::read(&target).unwrap(), &disk, &format!("seed {seed}: production storage alone"));
}

/// Moves the recovery to production storage, with Lifeboat dying before and after each record that says so.
fn move_through_crashes(sandbox: &Sandbox, target: &str, mut look: impl FnMut(&str)) {
    let rehydrate = ["rehydrate", "vm", "--to", target, "--overwrite", "--detach"];
    let cutover = ["cutover", "vm"];
    // What it was about to note, what makes it do so, and the states it may be found in afterwards.
    let steps: [(&str, &[&str], &[&str]); 5] = [
        ("move", &rehydrate, &["running"]),
        ("rehydrating", &rehydrate, &["running", "rehydrating", "ready-for-cutover"]),
        ("ready-for-cutover", &rehydrate, &["rehydrating", "ready-for-cutover"]),
        ("cutting-over", &cutover, &["rehydrating", "ready-for-cutover"]),
        ("cut-over", &cutover, &["rehydrating", "ready-for-cutover", "cut-over"]),
    ];
    let ready = || state_of(sandbox).is_some_and(|state| state == "ready-for-cutover");
    for (record, command, states) in steps {
        for moment in ["before", "after"] {
            let point = format!("{moment}:\"{record}\"");
            if command == cutover {
                wait_until("all is copied", ready);
            }
            let doomed = Doomed::start(sandbox, &point);
            if command == cutover {
                // After the restart it is copied and proven once more.
                wait_until("all is copied", ready);
            }
            // The answer is lost, or it was refused, for what was asked before has happened.
            let _ = sandbox.run(command);
            doomed.wait(&point);
            let now = state(sandbox);
            assert!(states.contains(&now.as_str()), "{point}: {now}");
            look(&point);
        }
    }
}

#[test]
#[ignore = "nightly: a VM looks for its disks every 16 seconds at the least, ten times"]
fn a_vm_runs_on_wherever_lifeboat_dies_on_its_way_to_production_storage() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let sandbox = Sandbox::with_plain_repository("64K");
    sandbox.ok(&["backup", "vm", &image(Image::Counter).display().to_string()]);
    let view = sandbox.json(&["recover", "vm", "--memory", "512M"]);
    let pid = view["pid"].clone();
    let mut console = Console::new(view["console"].as_str().unwrap());
    console.wait_for("seq 3");
    let target = sandbox.name("production.raw");
    move_through_crashes(&sandbox, &target, |point| {
        let reached = console.last_number("seq ").unwrap();
        console.wait_for(&format!("seq {}", reached + 3));
        assert_eq!(sandbox.json(&["recovery", "vm"])["pid"], pid, "{point}");
    });
    // The power goes: production storage alone holds everything.
    sandbox.kill_owner();
    kill(u32::try_from(pid.as_u64().unwrap()).unwrap());
    let promised = console.last_number("seq ").unwrap();
    let mut alone = Machine::boot(&sandbox, "alone", &target, Firmware::Bios);
    alone.console.wait_for("up boot=2");
    let kept = alone.console.next_number("log ok last=");
    assert!(kept >= promised, "the guest had synced record {promised}, production storage holds {kept}");
    alone.kill();
}

/// The state, from whoever answers now.
fn state_of(sandbox: &Sandbox) -> Option<String> {
    let output = sandbox.run(&["recovery", "vm", "--json"]);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    Some(value["state"].as_str()?.to_owned())
}

#[test]
fn of_two_who_cut_over_at_once_one_is_refused_and_nothing_is_lost() {
    let seed = seed();
    let (sandbox, disk, uri) = published();
    let guest = Guest::start(&uri, disk, seed);
    sandbox.ok(&["rehydrate", "vm", "--to", &sandbox.name("production.raw")]);
    let both: Vec<Child> = (0..2)
        .map(|_| sandbox.command(&["cutover", "vm"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
        .collect();
    let mut codes: Vec<Option<i32>> =
        both.into_iter().map(|child| child.wait_with_output().unwrap().status.code()).collect();
    codes.sort_unstable();
    assert_eq!(codes, [Some(0), Some(5)], "seed {seed}");
    guest.go_on();
    guest.check(&format!("seed {seed}"));
    let disk = guest.end();
    compare(&fs::read(sandbox.path("production.raw")).unwrap(), &disk, &format!("seed {seed}"));
}

#[test]
fn a_target_that_fails_somewhere_holds_the_move_and_costs_the_guest_nothing() {
    if !have(&["nbdkit"]) {
        return;
    }
    let seed = seed();
    let mut random = Random::new(seed);
    let (sandbox, disk, uri) = published();
    let (socket, fails) = (sandbox.path("target.sock"), sandbox.path("target-fails"));
    let mut target = Command::new("nbdkit");
    target
        .args(["--foreground", "--exit-with-parent", "--unix", &socket.display().to_string()])
        .args(["--filter=error", "memory", &format!("size={SIZE}"), "error=EIO", "error-pwrite-rate=100%"])
        .arg(format!("error-pwrite-file={}", fails.display()));
    let _target = Foreign::start(target.stderr(Stdio::null()));
    wait_until("the target listens", || UnixStream::connect(&socket).is_ok());
    let place = format!("nbd+unix:///?socket={}", socket.display());
    let guest = Guest::start(&uri, disk, seed);
    sandbox.ok(&["rehydrate", "vm", "--to", &place, "--overwrite", "--limit", "8M", "--detach"]);
    for _ in 0..2 {
        let enough = random.below(SIZE as u64 / 2);
        let copied = || sandbox.json(&["recovery", "vm"])["disks"][0]["hydrated"].as_u64().unwrap();
        wait_until("some is copied", || copied() > enough);
        fs::write(&fails, b"").unwrap();
        // The guest goes on changing what was copied, so something is written to the target before long.
        wait_until("the move is held", || {
            let view = sandbox.json(&["recovery", "vm"]);
            view["rehydration"]["phase"] == "held"
                && view["state"] == "rehydrating"
                && view["problem"].as_str().is_some_and(|why| why.contains("nbd+unix"))
        });
        guest.go_on();
        guest.check(&format!("seed {seed}: the target fails"));
        sandbox.fails(5, &["cutover", "vm"]);
        fs::remove_file(&fails).unwrap();
        sandbox.ok(&["rehydrate", "vm", "--resume"]);
    }
    wait_until("all is copied", || state(&sandbox) == "ready-for-cutover");
    sandbox.ok(&["cutover", "vm"]);
    guest.go_on();
    guest.check(&format!("seed {seed}: after the cutover"));
    let disk = guest.end();
    let copy = BlockingClient::connect(&place.parse().unwrap(), &ClientOptions::default()).unwrap();
    let mut found = vec![0; SIZE];
    copy.read(0, &mut found).unwrap();
    compare(&found, &disk, &format!("seed {seed}: production storage"));
}

#[test]
fn a_repository_that_is_away_for_a_while_delays_the_move_and_no_write() {
    let seed = seed();
    let (sandbox, mut disk, uri) = published();
    // Killed: what was read for the backup is in no cache, and no pack is open.
    sandbox.kill_owner();
    assert_eq!(state(&sandbox), "running");
    let (packs, away) = (sandbox.path("repo/packs"), sandbox.path("away"));
    fs::rename(&packs, &away).unwrap();
    let production = sandbox.name("production.raw");
    sandbox.ok(&["rehydrate", "vm", "--to", &production, "--limit", "4M", "--detach"]);
    let waits = |view: &serde_json::Value| {
        view["rehydration"]["phase"] == "retrying" && view["problem"].as_str().is_some_and(|why| why.contains("again"))
    };
    wait_until("the move waits for the repository", || waits(&sandbox.json(&["recovery", "vm"])));
    // What fills whole grains needs nothing from the repository.
    {
        let client = connect(&uri, &AtomicBool::new(false)).unwrap();
        disk[40_960..81_920].fill(7);
        client.write_durable(40_960, &[7; 40_960]).unwrap();
        let mut found = [0; 40_960];
        client.read(40_960, &mut found).unwrap();
        assert!(found == [7; 40_960]);
    }
    let guest = Guest::patient(&uri, disk, seed, Patience::WithErrors);
    assert_eq!(state(&sandbox), "rehydrating");
    // A restart meanwhile changes nothing.
    sandbox.kill_owner();
    wait_until("the move waits for the repository again", || waits(&sandbox.json(&["recovery", "vm"])));
    fs::rename(&away, &packs).unwrap();
    wait_until("all is copied", || state(&sandbox) == "ready-for-cutover");
    guest.go_on();
    guest.check(&format!("seed {seed}: it is back"));
    sandbox.ok(&["cutover", "vm"]);
    guest.go_on();
    let disk = guest.end();
    compare(&fs::read(production).unwrap(), &disk, &format!("seed {seed}"));
}

/// Stands between a client and a server, and cuts all connections when told to.
struct Cutter {
    socket: PathBuf,
    open: Arc<Mutex<Vec<UnixStream>>>,
}

impl Cutter {
    fn start(socket: PathBuf, server: &Path) -> Cutter {
        let listener = UnixListener::bind(&socket).unwrap();
        let open = Arc::<Mutex<Vec<UnixStream>>>::default();
        let (cut, server) = (open.clone(), server.to_owned());
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = UnixStream::connect(&server) else { continue };
                cut.lock().unwrap().extend([client.try_clone().unwrap(), server.try_clone().unwrap()]);
                for (mut from, mut to) in [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)]
                {
                    std::thread::spawn(move || {
                        // Cut in the middle of something.
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
            }
        });
        Cutter { socket, open }
    }

    fn cut(&self) {
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both); // it may have ended by itself
        }
    }
}

#[test]
fn connections_that_are_cut_lose_nothing_through_the_whole_move() {
    let seed = seed();
    let mut random = Random::new(seed);
    let (sandbox, disk, uri) = published();
    let server = uri.split_once("socket=").unwrap().1.to_owned();
    let cutter = Cutter::start(sandbox.path("between.sock"), Path::new(&server));
    let between = uri.replace(&server, &cutter.socket.display().to_string());
    let guest = Guest::start(&between, disk, seed);
    let mut cut_for_a_while = |times| {
        for _ in 0..times {
            std::thread::sleep(Duration::from_micros(500 + random.below(15_000)));
            cutter.cut();
        }
    };
    cut_for_a_while(20);
    sandbox.ok(&["rehydrate", "vm", "--to", &sandbox.name("production.raw"), "--limit", "8M", "--detach"]);
    cut_for_a_while(20);
    wait_until("all is copied", || state(&sandbox) == "ready-for-cutover");
    let cutover = sandbox.command(&["cutover", "vm"]).stdout(Stdio::null()).spawn();
    cut_for_a_while(20);
    assert!(cutover.unwrap().wait().unwrap().success());
    guest.check(&format!("seed {seed}"));
    let disk = guest.end();
    compare(&fs::read(sandbox.path("production.raw")).unwrap(), &disk, &format!("seed {seed}"));
}

#[test]
fn a_discard_before_the_cutover_leaves_no_half_of_a_disk_behind() {
    let (sandbox, _, _) = published();
    let target = sandbox.name("production.raw");
    sandbox.ok(&["rehydrate", "vm", "--to", &target, "--limit", "1M", "--detach"]);
    assert!(sandbox.path("production.raw").exists());
    let said = sandbox.ok(&["discard", "vm"]);
    assert!(said.contains("is as it was") && !said.contains("production.raw"), "{said}");
    assert!(!sandbox.path("production.raw").exists());
}
