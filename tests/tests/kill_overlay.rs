//! `kill -9` of an export under random load from several connections: every write that was acknowledged is there
//! afterwards, and nothing that was never written.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use lifeboat_tests::{Random, Running, Sandbox, noise, rounds, seed, wait_until};
use nbd_server::export::ZeroMode;
use nbd_server::{Client, ClientError, ClientOptions, NbdUri};
use tokio::runtime::Runtime;

const SECTOR: usize = 512;
/// What one request changes at most; requests in flight at once never share a block.
const BLOCK_SECTORS: usize = 8;
const BLOCK: u64 = (SECTOR * BLOCK_SECTORS) as u64;
const BLOCKS: u64 = 300;
/// The disk ends inside a grain.
const DISK: u64 = BLOCKS * BLOCK - 3 * SECTOR as u64;
const CONNECTIONS: u64 = 3;
const WORKERS: u64 = 9;

/// What a sector holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    /// What the recovery point has there.
    Base,
    Zero,
    /// Written by the write of this number.
    Write(u64),
}

fn bytes_of(holds: Holds, sector: u64, base: &[u8]) -> Vec<u8> {
    let at = usize::try_from(sector).unwrap() * SECTOR;
    match holds {
        Holds::Base => base[at..at + SECTOR].to_vec(),
        Holds::Zero => vec![0; SECTOR],
        Holds::Write(number) => noise((sector << 32) ^ number, SECTOR),
    }
}

/// A change that was sent and not acknowledged: each of its sectors may be old or new.
#[derive(Debug, Clone, Copy)]
struct Pending {
    first: u64,
    sectors: u64,
    holds: Holds,
}

/// The blocks of one worker, whose changes come one after the other.
struct Worker {
    number: u64,
    random: Random,
    model: Vec<(u64, Holds)>,
    pending: Option<Pending>,
    acknowledged: u64,
}

struct Load {
    runtime: Runtime,
    clients: Vec<Client>,
    base: Arc<Vec<u8>>,
    writes: Arc<AtomicU64>,
}

fn connect(uri: &str) -> (Runtime, Vec<Client>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let uri: NbdUri = uri.parse().unwrap();
    let options = ClientOptions { connect_timeout: Duration::from_secs(60), ..ClientOptions::default() };
    let clients = (0..CONNECTIONS).map(|_| runtime.block_on(Client::connect(&uri, &options)).unwrap()).collect();
    (runtime, clients)
}

impl Worker {
    /// Until the connection is lost, which it is when the server is killed.
    fn run(&mut self, load: &Load) {
        let client = &load.clients[usize::try_from(self.number % CONNECTIONS).unwrap()];
        loop {
            match load.runtime.block_on(self.step(client, load)) {
                Ok(()) => self.acknowledged += 1,
                Err(ClientError::Lost(_)) => return,
                Err(error) => panic!("worker {}: {error}", self.number),
            }
        }
    }

    async fn step(&mut self, client: &Client, load: &Load) -> Result<(), ClientError> {
        let block = self.random.below(BLOCKS / WORKERS) * WORKERS + self.number;
        let in_block = BLOCK_SECTORS as u64;
        let first = block * in_block + if self.random.once_in(2) { 0 } else { self.random.below(in_block) };
        let end = ((block + 1) * in_block).min(DISK / SECTOR as u64);
        let Some(most) = end.checked_sub(first).filter(|most| *most > 0) else { return Ok(()) };
        let sectors = if self.random.once_in(2) { most } else { 1 + self.random.below(most) };
        let (offset, length) = (first * SECTOR as u64, sectors * SECTOR as u64);
        match self.random.below(20) {
            0 => return client.flush().await,
            1..4 => {
                let mut found = vec![0; usize::try_from(length).unwrap()];
                client.read(offset, &mut found).await?;
                for (sector, found) in (first..).zip(found.chunks(SECTOR)) {
                    let expected = bytes_of(self.model[self.place(sector)].1, sector, &load.base);
                    assert!(found == expected, "worker {}: sector {sector} reads other bytes", self.number);
                }
                return Ok(());
            }
            kind @ 4..7 => {
                self.pending = Some(Pending { first, sectors, holds: Holds::Zero });
                match kind {
                    4 => client.trim(offset, length).await?,
                    5 => client.write_zeroes(offset, length, ZeroMode::MayPunch).await?,
                    _ => client.write_zeroes(offset, length, ZeroMode::KeepAllocated).await?,
                }
            }
            kind => {
                let holds = Holds::Write(load.writes.fetch_add(1, Ordering::Relaxed));
                let data: Vec<u8> =
                    (first..first + sectors).flat_map(|sector| bytes_of(holds, sector, &load.base)).collect();
                self.pending = Some(Pending { first, sectors, holds });
                match kind {
                    7..9 => client.write_durable(offset, &data).await?,
                    _ => client.write(offset, &data).await?,
                }
            }
        }
        if let Some(Pending { first, sectors, holds }) = self.pending.take() {
            for sector in first..first + sectors {
                let place = self.place(sector);
                self.model[place].1 = holds;
            }
        }
        Ok(())
    }

    fn place(&self, sector: u64) -> usize {
        self.model.binary_search_by_key(&sector, |(sector, _)| *sector).unwrap()
    }
}

/// A disk that is exported, killed and exported again.
struct Harness {
    sandbox: Sandbox,
    random: Random,
    base: Arc<Vec<u8>>,
    /// What each sector holds.
    model: Vec<Holds>,
    writes: Arc<AtomicU64>,
    acknowledged: u64,
    undecided: u64,
}

impl Harness {
    fn new(seed: u64) -> Harness {
        let sandbox = Sandbox::with_plain_repository("16K");
        let mut base = noise(seed, usize::try_from(DISK).unwrap());
        base[100_000..400_000].fill(0);
        fs::write(sandbox.path("disk.raw"), &base).unwrap();
        sandbox.ok(&["backup", "web01", &sandbox.name("disk.raw")]);
        Harness {
            random: Random::new(seed),
            base: Arc::new(base),
            model: vec![Holds::Base; usize::try_from(DISK).unwrap() / SECTOR],
            writes: Arc::new(AtomicU64::new(1)),
            acknowledged: 0,
            undecided: 0,
            sandbox,
        }
    }

    fn export(&self) -> (Running, String) {
        self.sandbox.export(&["web01", "--overlay", &self.sandbox.name("overlay")])
    }

    /// Load until the kill; what the workers know becomes the model, what was in flight is returned.
    fn round(&mut self) -> Vec<Pending> {
        let (mut export, uri) = self.export();
        let (runtime, clients) = connect(&uri);
        let load = Load { runtime, clients, base: Arc::clone(&self.base), writes: Arc::clone(&self.writes) };
        self.check(&load, &[]);
        let mut workers: Vec<Worker> = (0..WORKERS)
            .map(|number| Worker {
                number,
                random: Random::new(self.random.number()),
                model: (0..)
                    .zip(&self.model)
                    .filter(|(sector, _)| owner(*sector) == number)
                    .map(|(sector, holds)| (sector, *holds))
                    .collect(),
                pending: None,
                acknowledged: 0,
            })
            .collect();
        let pause = Duration::from_micros(self.random.below(60_000));
        thread::scope(|scope| {
            for worker in &mut workers {
                scope.spawn(|| worker.run(&load));
            }
            thread::sleep(pause);
            export.kill();
        });
        let mut pending = Vec::new();
        for worker in workers {
            self.acknowledged += worker.acknowledged;
            pending.extend(worker.pending);
            for (sector, holds) in worker.model {
                self.model[usize::try_from(sector).unwrap()] = holds;
            }
        }
        self.undecided += pending.len() as u64;
        pending
    }

    /// Compares all of the disk with the model; sectors that were in flight are old or new, and from now on what they are.
    fn check(&mut self, load: &Load, pending: &[Pending]) {
        let mut found = vec![0; self.base.len()];
        load.runtime.block_on(load.clients[0].read(0, &mut found)).unwrap();
        for (number, found) in found.chunks(SECTOR).enumerate() {
            let sector = number as u64;
            let flying = pending.iter().find(|flying| (flying.first..flying.first + flying.sectors).contains(&sector));
            let allowed: Vec<Holds> =
                [Some(self.model[number]), flying.map(|flying| flying.holds)].into_iter().flatten().collect();
            let holds = allowed.iter().find(|holds| bytes_of(**holds, sector, &self.base) == found);
            self.model[number] = *holds.unwrap_or_else(|| {
                let others =
                    [Holds::Base, Holds::Zero].into_iter().find(|holds| bytes_of(*holds, sector, &self.base) == found);
                panic!("sector {sector} holds neither of {allowed:?} but {others:?}, {:02x?}...", &found[..8])
            });
        }
    }
}

fn owner(sector: u64) -> u64 {
    sector / BLOCK_SECTORS as u64 % WORKERS
}

#[test]
fn acknowledged_writes_survive_kill_minus_nine_of_the_export_at_any_moment() {
    let (seed, rounds) = (seed(), rounds(15, 1000));
    println!("LIFEBOAT_SEED={seed}, {rounds} rounds");
    let mut harness = Harness::new(seed);
    let mut last = 0;
    for round in 1..=rounds {
        println!("round {round} of seed {seed}");
        let pending = harness.round();
        // Served again, it is what it was; that it can be served at all is part of it.
        let (mut export, uri) = harness.export();
        let (runtime, clients) = connect(&uri);
        let load = Load { runtime, clients, base: Arc::clone(&harness.base), writes: Arc::clone(&harness.writes) };
        harness.check(&load, &pending);
        drop(load);
        // Some end in order: that must not make a difference.
        match harness.random.once_in(4) {
            true => assert!(export.stop().success()),
            false => export.kill(),
        }
        if harness.random.once_in(10) {
            last += harness.acknowledged;
            let overlay = harness.sandbox.path("overlay");
            wait_until("the overlay is gone", || fs::remove_dir_all(&overlay).is_ok());
            harness.model.fill(Holds::Base);
        }
    }
    harness.sandbox.ok(&["verify", "--read-data"]);
    let (done, undecided) = (harness.acknowledged, harness.undecided);
    assert!(done > rounds * 10, "only {done} requests in {rounds} rounds: that proves nothing");
    println!(
        "seed {seed}: {rounds} kills, {done} requests acknowledged and kept, {undecided} in flight; {last} on overlays that were dropped"
    );
}
