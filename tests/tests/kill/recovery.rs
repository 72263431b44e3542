//! Recoveries that are killed: while they are made, written to through NBD, copied to production storage, cut over, and
//! discarded.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use lifeboat_tests::{Running, kill, noise, wait_until};
use nbd_server::{BlockingClient, ClientError, ClientOptions};
use serde_json::Value;

use super::Harness;

const BLOCK: usize = 4096;
/// Of all writes so far, the last acknowledged one to a block counts, and the one in flight may.
type InFlight = Option<(usize, Vec<u8>)>;

/// A recovery's disk, as it has to read.
struct Disk {
    name: String,
    target: String,
    model: Vec<u8>,
}

impl Harness {
    /// One recovery from its beginning to its end.
    pub fn recover(&mut self) {
        let Some((id, point)) = self.any_point() else { return self.back_up() };
        let name = format!("r{}", self.round);
        let target = self.sandbox.name(&format!("{name}.raw"));
        let mut disk = Disk { name, target, model: point.bytes.to_vec() };
        self.disturbed("recover", &["recover", &id, "--name", &disk.name, "--on", "none"]);
        if !self.recoveries().contains(&disk.name) {
            self.sandbox.ok(&["recover", &id, "--name", &disk.name, "--on", "none"]);
        }
        wait_until("the recovery runs", || self.recovery(&disk)["state"] == "running");
        if self.random.once_in(2) {
            self.owner_killed("writes to a recovery", &mut disk, None);
        }
        match self.random.below(4) {
            0 => self.write_some(&mut disk),
            _ => self.move_to_production(&mut disk),
        }
        self.discard(&disk);
    }

    fn recoveries(&self) -> Vec<String> {
        let listed = self.sandbox.json(&["recoveries"]);
        let listed = listed.as_array().unwrap_or_else(|| self.fail("recoveries are no list"));
        listed.iter().map(|recovery| recovery["name"].as_str().unwrap_or_default().to_owned()).collect()
    }

    fn recovery(&self, disk: &Disk) -> Value {
        let view = self.sandbox.json(&["recovery", &disk.name]);
        if view["state"] == "failed" || view["problem"].is_string() {
            self.fail(format_args!("recovery {}: {view}", disk.name));
        }
        view
    }

    fn connect(&self, disk: &Disk) -> BlockingClient {
        let view = self.recovery(disk);
        let uri = view["disks"][0]["nbd_uri"].as_str().unwrap_or_else(|| self.fail(format_args!("no URI in {view}")));
        let options = ClientOptions { connect_timeout: Duration::from_secs(60), ..ClientOptions::default() };
        let uri = uri.parse().unwrap_or_else(|error| self.fail(format_args!("{uri}: {error}")));
        BlockingClient::connect(&uri, &options).unwrap_or_else(|error| self.fail(error))
    }

    fn block(&mut self, disk: &Disk) -> (usize, Vec<u8>) {
        let start = self.random.index(disk.model.len() / BLOCK) * BLOCK;
        let bytes = if self.random.once_in(5) { vec![0; BLOCK] } else { noise(self.random.number(), BLOCK) };
        (start, bytes)
    }

    fn write_some(&mut self, disk: &mut Disk) {
        let client = self.connect(disk);
        for _ in 0..self.random.below(30) {
            let (start, bytes) = self.block(disk);
            client.write(start as u64, &bytes).unwrap_or_else(|error| self.fail(error));
            disk.model[start..start + BLOCK].copy_from_slice(&bytes);
        }
        self.reads(disk, &client, None);
    }

    /// Writes until the service, killed meanwhile, is gone, and lets `command` run beside that. What was acknowledged is
    /// there afterwards.
    fn owner_killed(&mut self, kind: &'static str, disk: &mut Disk, command: Option<Running>) {
        let client = Arc::new(self.connect(disk));
        let owner = self.sandbox.owner().unwrap_or_else(|| self.fail("nobody serves a recovery"));
        if !self.sandbox.processes().contains(&owner) {
            self.fail("the service of a recovery has ended");
        }
        let pause = Duration::from_micros(self.random.below(60_000));
        let killer = thread::spawn(move || {
            thread::sleep(pause);
            kill(owner);
        });
        let in_flight: InFlight = loop {
            let (start, bytes) = self.block(disk);
            let written = match self.random.once_in(6) {
                true => client.write_durable(start as u64, &bytes),
                false => client.write(start as u64, &bytes),
            };
            match written {
                Ok(()) => disk.model[start..start + BLOCK].copy_from_slice(&bytes),
                Err(ClientError::Lost(_)) => break Some((start, bytes)),
                Err(error) => self.fail(error),
            }
        };
        killer.join().unwrap_or_else(|_| self.fail("the killer panicked"));
        *self.killed.entry(kind).or_default() += 1;
        if let Some(mut command) = command {
            command.wait();
        }
        let client = self.connect(disk);
        self.reads(disk, &client, in_flight);
    }

    fn reads(&self, disk: &mut Disk, client: &BlockingClient, in_flight: InFlight) {
        let mut found = vec![0; disk.model.len()];
        client.read(0, &mut found).unwrap_or_else(|error| self.fail(error));
        for (at, found) in found.chunks(BLOCK).enumerate() {
            let start = at * BLOCK;
            let model = &mut disk.model[start..start + found.len()];
            // A write that was cut off is there, or not, or in part.
            if in_flight.as_ref().is_some_and(|(flying, _)| *flying == start) {
                let (_, new) = in_flight.as_ref().unwrap_or_else(|| self.fail("something is in flight"));
                let known =
                    found.iter().zip(model.iter().zip(new)).all(|(found, (old, new))| found == old || found == new);
                if known {
                    model.copy_from_slice(found);
                }
            }
            if found != model {
                self.fail(format_args!("{}: the block at {start} lost an acknowledged write", disk.name));
            }
        }
    }

    fn move_to_production(&mut self, disk: &mut Disk) {
        let (name, target) = (disk.name.clone(), disk.target.clone());
        let args = ["rehydrate", &name, "--to", &target, "--overwrite", "--detach"];
        let limited = [&args[..], &["--limit", "2M"]].concat();
        let begin = self.sandbox.start(&limited);
        self.owner_killed("rehydrate", disk, Some(begin));
        if self.recovery(disk)["state"] == "running" {
            self.sandbox.ok(&args); // the kill came before it was journalled
        }
        self.write_some(disk);
        self.ready(disk);
        if self.random.once_in(2) {
            let cutover = self.sandbox.start(&["cutover", &name]);
            self.owner_killed("cutover", disk, Some(cutover));
        }
        if self.recovery(disk)["state"] != "cut-over" {
            self.ready(disk);
            self.sandbox.ok(&["cutover", &name]);
        }
        self.write_some(disk);
        self.connect(disk).flush().unwrap_or_else(|error| self.fail(error));
        let found = std::fs::read(&target).unwrap_or_else(|error| self.fail(error));
        if found != disk.model {
            let at = found.iter().zip(&disk.model).position(|(found, model)| found != model);
            self.fail(format_args!("{name}: production storage has other bytes from {at:?} on"));
        }
    }

    fn ready(&self, disk: &Disk) {
        wait_until("everything is copied", || self.recovery(disk)["state"] == "ready-for-cutover");
    }

    fn discard(&mut self, disk: &Disk) {
        if !self.disturbed("discard", &["discard", &disk.name]) && self.recoveries().contains(&disk.name) {
            self.sandbox.run(&["discard", &disk.name]); // which the killed command's service may be doing
        }
        wait_until("the recovery is gone", || !self.recoveries().contains(&disk.name));
        let _ = std::fs::remove_file(&disk.target);
        // The service would stay for some seconds more.
        if let Some(owner) = self.sandbox.owner().filter(|owner| self.sandbox.processes().contains(owner)) {
            kill(owner);
        }
    }
}
