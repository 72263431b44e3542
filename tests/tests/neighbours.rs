//! Twenty recoveries on one host: what one has read is there for all, and one that misbehaves takes nothing from the
//! others but its share.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lifeboat_tests::{Random, Sandbox, noise, raw, seed, tool_output, wait_until};
use nbd_server::wire::Errno;
use nbd_server::{BlockingClient, ClientError, ClientOptions};

const RECOVERIES: usize = 20;
const SIZE: usize = 4 << 20;
const BLOCK: u64 = 4096;

/// How many requests the well-behaved make together.
const REQUESTS: u64 = 17 * 150;

/// The misbehaving: one that asks without a rest, one that takes no answer, one that has filled its overlay.
const GREEDY: usize = 0;
const DEAF: usize = 1;
const FULL: usize = 2;
const GOOD: std::ops::Range<usize> = 3..RECOVERIES;

struct Host {
    sandbox: Sandbox,
    disk: Vec<u8>,
}

impl Host {
    fn start() -> Host {
        let sandbox = Sandbox::with_plain_repository("64K");
        let disk = noise(31, SIZE);
        fs::write(sandbox.path("disk.raw"), &disk).unwrap();
        sandbox.ok(&["backup", "vm", &sandbox.name("disk.raw")]);
        for number in 0..RECOVERIES {
            sandbox.ok(&["recover", "vm", "--on", "none", "--name", &format!("r{number}")]);
        }
        Host { sandbox, disk }
    }

    fn socket(&self, number: usize) -> PathBuf {
        self.sandbox.path(&format!("state/recoveries/r{number}/nbd.sock"))
    }

    fn client(&self, number: usize) -> BlockingClient {
        let uri = format!("nbd+unix:///disk0?socket={}", self.socket(number).display());
        BlockingClient::connect(&uri.parse().unwrap(), &ClientOptions::default()).unwrap()
    }

    /// Memory that the service has in use, in bytes.
    fn resident(&self) -> u64 {
        let pid = self.sandbox.owner().unwrap();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
    }
}

#[test]
fn what_one_recovery_has_read_is_in_memory_for_all_and_what_one_writes_is_its_own() {
    let host = Host::start();
    for number in 0..RECOVERIES {
        let client = host.client(number);
        let mut found = vec![0; SIZE];
        for (at, part) in (0..).step_by(64 << 10).zip(found.chunks_mut(64 << 10)) {
            client.read(at, part).unwrap();
        }
        assert!(found == host.disk, "r{number}");
        let mark = vec![u8::try_from(number).unwrap(); 4096];
        client.write(number as u64 * BLOCK, &mark).unwrap();
        client.flush().unwrap();
    }
    let views = host.sandbox.json(&["recoveries"]);
    for number in 1..RECOVERIES {
        let name = format!("r{number}");
        let view = views.as_array().unwrap().iter().find(|view| view["name"] == name.as_str()).unwrap();
        let served = &view["disks"][0]["served"];
        assert_eq!(served["reads"], SIZE >> 16, "{name}");
        // The first one needs the recovery's own table of the disk.
        let from_memory = served["reads_from_memory"].as_u64().unwrap();
        assert!(from_memory + 1 >= SIZE as u64 >> 16, "{name} read anew what r0 had read: {served}");
    }
    for number in 0..RECOVERIES {
        let mut found = vec![0; SIZE];
        host.client(number).read(0, &mut found).unwrap();
        let mut wanted = host.disk.clone();
        wanted[number * 4096..][..4096].fill(u8::try_from(number).unwrap());
        assert!(found == wanted, "r{number}");
    }
}

/// A client that asks for 128 blocks at a time, one half of them writes, without a rest.
fn hammer(host: &Host, stop: &AtomicBool, seed: u64) -> u64 {
    let mut random = Random::new(seed);
    let mut stream = raw::transmitting(&host.socket(GREEDY), "disk0").unwrap();
    let mut done = 0;
    while !stop.load(Ordering::Relaxed) {
        let (mut requests, mut answers) = (Vec::new(), 0);
        for _ in 0..128 {
            let offset = random.below(SIZE as u64 / BLOCK) * BLOCK;
            let write = random.once_in(2);
            requests.extend(raw::request(u8::from(write), offset, 4096));
            if write {
                requests.extend([7; 4096]);
            }
            answers += raw::SIMPLE_REPLY + if write { 0 } else { 4096 };
        }
        stream.write_all(&requests).unwrap();
        stream.read_exact(&mut vec![0; answers]).unwrap();
        done += 128;
    }
    done
}

/// What a well-behaved client did until all together had done enough.
struct Done {
    requests: u64,
    times: Vec<Duration>,
}

/// One request at a time; every block that is read is compared with what was written last.
fn behave(host: &Host, number: usize, seed: u64, all: &AtomicU64, begin: &Barrier) -> Done {
    let mut random = Random::new(seed ^ number as u64);
    let client = host.client(number);
    let mut disk = vec![0; SIZE];
    client.read(0, &mut disk).unwrap();
    let mut done = Done { requests: 0, times: Vec::new() };
    begin.wait();
    while all.load(Ordering::Relaxed) < REQUESTS {
        let offset = random.below(SIZE as u64 / BLOCK) * BLOCK;
        let place = usize::try_from(offset).unwrap()..usize::try_from(offset + BLOCK).unwrap();
        let began = Instant::now();
        match random.below(20) {
            0 => client.flush().unwrap(),
            1..10 => {
                let data = noise(random.number(), 4096);
                client.write(offset, &data).unwrap();
                disk[place].copy_from_slice(&data);
            }
            _ => {
                let mut found = [0; 4096];
                client.read(offset, &mut found).unwrap();
                assert!(found == disk[place], "seed {seed}: r{number} reads other bytes at {offset}");
            }
        }
        done.times.push(began.elapsed());
        done.requests += 1;
        all.fetch_add(1, Ordering::Relaxed);
    }
    let mut found = vec![0; SIZE];
    client.read(0, &mut found).unwrap();
    assert!(found == disk, "seed {seed}: r{number} holds something else in the end");
    done
}

/// Whether the misbehaving are there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Company {
    Good,
    Bad,
}

/// The well-behaved at work; how many requests the greedy one got in meanwhile.
fn at_work(host: &Host, company: Company, seed: u64) -> (Vec<Done>, u64) {
    let (stop, all, begin) = (AtomicBool::new(false), AtomicU64::new(0), Barrier::new(GOOD.len()));
    std::thread::scope(|scope| {
        let ended = Stop(&stop);
        let greedy: Vec<_> = (0..if company == Company::Bad { 3 } else { 0 })
            .map(|lane| {
                scope.spawn({
                    let stop = &stop;
                    move || hammer(host, stop, seed ^ (lane << 32))
                })
            })
            .collect();
        let good: Vec<_> = GOOD
            .map(|number| {
                scope.spawn({
                    let (all, begin) = (&all, &begin);
                    move || behave(host, number, seed, all, begin)
                })
            })
            .collect();
        let done = good.into_iter().map(|thread| thread.join().unwrap()).collect();
        drop(ended);
        (done, greedy.into_iter().map(|thread| thread.join().unwrap()).sum())
    })
}

/// Ends those who work on without end when dropped, also by a failing test.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Four clients that ask for much and take nothing.
fn deaf(host: &Host) -> Vec<std::os::unix::net::UnixStream> {
    let ask = raw::request(0, 0, 1 << 20);
    (0..4)
        .map(|_| {
            let mut stream = raw::transmitting(&host.socket(DEAF), "disk0").unwrap();
            stream.set_nonblocking(true).unwrap();
            // It is not read from any more at some time.
            for _ in 0..20_000 {
                if stream.write(&ask).is_err() {
                    break;
                }
            }
            stream
        })
        .collect()
}

/// Puts the overlay of one recovery on a file system of its own, which is soon full. `None` where that cannot be done.
fn fill(host: &Host) -> Option<Unmount> {
    let disks = host.sandbox.path(&format!("state/recoveries/r{FULL}/disks"));
    let moved = host.sandbox.path("moved");
    host.sandbox.kill_owner();
    fs::rename(&disks, &moved).unwrap();
    fs::create_dir(&disks).unwrap();
    let (from, to) = (moved.display().to_string(), disks.display().to_string());
    let mounted = tool_output("mount", &["-t", "tmpfs", "-o", "size=1m", "tmpfs", &to]).status.success();
    assert!(tool_output("cp", &["-a", "--sparse=always", &format!("{from}/."), &to]).status.success());
    let unmount = mounted.then_some(Unmount(to));
    host.sandbox.json(&["recovery", &format!("r{FULL}")]);
    unmount?.filled(host)
}

/// Unmounts when dropped, also by a failing test.
struct Unmount(String);

impl Unmount {
    fn filled(self, host: &Host) -> Option<Unmount> {
        let client = host.client(FULL);
        let mut told = None;
        for at in (0..SIZE as u64).step_by(64 << 10) {
            if let Err(error) = client.write(at, &noise(at, 64 << 10)) {
                told = Some(error);
                break;
            }
        }
        assert!(matches!(told, Some(ClientError::Server(Errno::NoSpc))), "{told:?}");
        Some(self)
    }
}

impl Drop for Unmount {
    fn drop(&mut self) {
        tool_output("umount", &["-l", &self.0]);
    }
}

#[test]
fn recoveries_that_misbehave_take_nothing_from_the_others() {
    const GROWTH_MAX: u64 = 512 << 20;
    let seed = seed();
    let host = Host::start();
    let Some(full) = fill(&host) else {
        lifeboat_tests::skip("cannot mount a small file system without root");
        return;
    };
    let before = host.resident();
    let deaf = deaf(&host);
    let (done, greedy) = at_work(&host, Company::Bad, seed);
    let grown = host.resident().saturating_sub(before);
    assert!(grown < GROWTH_MAX, "seed {seed}: {} MiB more", grown >> 20);
    assert!(greedy > 0, "seed {seed}");
    // None of them is left behind, whatever the others do.
    let average = REQUESTS / done.len() as u64;
    for (number, done) in GOOD.zip(&done) {
        let requests = done.requests;
        assert!(requests > average / 10, "seed {seed}: r{number} made {requests} requests, on average {average}");
    }
    // The full one reads on, and takes writes when there is room.
    let mut found = [0; 4096];
    host.client(FULL).read(SIZE as u64 - BLOCK, &mut found).unwrap();
    assert!(found == host.disk[SIZE - 4096..]);
    assert!(tool_output("mount", &["-o", "remount,size=16m", &full.0]).status.success());
    wait_until("there is room", || host.client(FULL).write(SIZE as u64 - BLOCK, &[1; 4096]).is_ok());
    drop(deaf);
    host.sandbox.kill_owner();
    drop(full);
}

/// What a request of a well-behaved client takes, alone and beside the others.
#[test]
#[ignore = "nightly: prints figures, which mean something on a quiet machine only"]
fn figures_of_twenty_recoveries_with_and_without_bad_company() {
    let seed = seed();
    let host = Host::start();
    let full = fill(&host);
    let quantile = |done: &[Done], per_mille: usize| {
        let mut times: Vec<Duration> = done.iter().flat_map(|done| done.times.iter().copied()).collect();
        times.sort_unstable();
        times[(times.len() - 1) * per_mille / 1000]
    };
    let (good, _) = at_work(&host, Company::Good, seed);
    let deaf = deaf(&host);
    let (bad, greedy) = at_work(&host, Company::Bad, seed);
    for (what, done) in [("alone", &good), ("beside three that misbehave", &bad)] {
        let least = done.iter().map(|done| done.requests).min();
        eprintln!(
            "17 recoveries, one 4 KiB request each at a time, {what}: p50 {:?}, p99 {:?}, p99.9 {:?}; least {least:?}",
            quantile(done, 500),
            quantile(done, 990),
            quantile(done, 999),
        );
    }
    eprintln!(
        "the greedy one made {greedy} requests meanwhile, {} times as many as one of the others",
        greedy * 17 / REQUESTS
    );
    assert!(greedy > 0 && bad.iter().all(|done| done.requests > 0));
    drop(deaf);
    host.sandbox.kill_owner();
    drop(full);
}
