//! Watches over a drill's machine: tells the course what the guest's console, disks, processor and machine show.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hypervisor::{MachineEvent, MachineFiles, Qemu, Subscription};
use nbd_server::{ExportName, ExportTable};
use regex::Regex;
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use super::console::{Console, FLOOD};
use super::course::{Event, Stage};
use super::signs;
use super::traced::Recorder;
use crate::statistics::Served;

const CONSOLE_INTERVAL: Duration = Duration::from_millis(20);
const DISK_INTERVAL: Duration = Duration::from_millis(10);
const PROCESSOR_INTERVAL: Duration = Duration::from_millis(200);
/// What a guest says before it goes may be read after it is gone.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// A drill's machine, and what is known of it.
#[derive(Debug)]
pub(super) struct Lab {
    pub vm: Qemu,
    pub files: MachineFiles,
    pub console: Mutex<Console>,
    pub recorder: Arc<Recorder>,
    pub table: Arc<ExportTable>,
    pub exports: Vec<ExportName>,
    pub began: Instant,
    /// Where the course stands.
    pub stage: watch::Receiver<Stage>,
    /// When the stage was entered, in milliseconds.
    pub events: mpsc::Sender<(Event, u64)>,
}

impl Lab {
    /// Since the drill began.
    pub fn millis(&self) -> u64 {
        millis(self.began)
    }

    /// Tells the course what has happened now.
    pub async fn tell(&self, event: Event) {
        self.tell_at(event, self.millis()).await;
    }

    /// Tells the course what has happened then.
    pub async fn tell_at(&self, event: Event, at: u64) {
        // The course may have ended meanwhile.
        let _ = self.events.send((event, at)).await;
    }

    /// Sums up what the guest asked of its disks.
    pub fn sum(&self, count: impl Fn(&Served) -> u64) -> u64 {
        let served = self.exports.iter().filter_map(|name| Served::of(&self.table, name));
        served.map(|served| count(&served)).sum()
    }

    pub fn read_console<T>(&self, read: impl FnOnce(&mut Console) -> T) -> T {
        read(&mut self.console.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Since then.
pub(super) fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Follows the console: `expected` are checks by number and what they look for.
pub(super) async fn console(lab: Arc<Lab>, mut expected: Vec<(usize, Regex)>) {
    let mut kernel = false;
    loop {
        let events = lab.read_console(|console| {
            let mut events = Vec::new();
            match console.read_on() {
                Ok(false) => return events,
                Ok(true) => {}
                Err(error) => events.push(Event::Broken(format!("its console cannot be read: {error}"))),
            }
            let text = console.text();
            if !kernel && let Some(line) = signs::kernel(text) {
                kernel = true;
                events.push(Event::Kernel(format!("its console: {line}")));
            }
            expected.retain(|(number, expression)| {
                let found = expression.find(text).map(|found| found.as_str().trim().chars().take(200).collect());
                let seen = found.is_some();
                events.extend(found.map(|line: String| Event::Passed(*number, line)));
                !seen
            });
            if let Some(why) = signs::given_up(text) {
                events.push(Event::Broken(why.to_owned()));
            }
            if console.length() > FLOOD {
                events.push(Event::Broken("the guest floods its console".to_owned()));
            }
            events
        });
        for event in events {
            lab.tell(event).await;
        }
        sleep(CONSOLE_INTERVAL).await;
    }
}

/// Follows what the firmware says, until it has found nothing to boot.
pub(super) async fn firmware(lab: Arc<Lab>) {
    let mut log = Console::new(&lab.files.firmware_log());
    while *lab.stage.borrow() < Stage::Kernel {
        // A log that cannot be read says nothing.
        if log.read_on().unwrap_or(false)
            && let Some(why) = signs::given_up(log.text())
        {
            return lab.tell(Event::Broken(why.to_owned())).await;
        }
        sleep(PROCESSOR_INTERVAL).await;
    }
}

/// Follows the disks until the first block was read.
pub(super) async fn disks(lab: Arc<Lab>) {
    loop {
        if let Some(at) = lab.recorder.first_read() {
            return lab.tell_at(Event::FirstRead, at).await;
        }
        sleep(DISK_INTERVAL).await;
    }
}

/// Looks at the first processor until it runs a kernel.
pub(super) async fn processor(lab: Arc<Lab>) {
    loop {
        let asked = lab.vm.call("human-monitor-command", json!({ "command-line": "info registers" })).await;
        if let Ok(registers) = asked
            && runs_a_kernel(registers.as_str().unwrap_or_default())
        {
            return lab.tell(Event::Kernel("its processor runs in a kernel's address space".to_owned())).await;
        }
        sleep(PROCESSOR_INTERVAL).await;
    }
}

/// Whether a processor's registers, as `info registers` gives them, are those of an operating system: firmware and boot
/// loaders run where addresses are as the memory's, a kernel in the upper half of the address space, and a program
/// without privileges has a kernel below it.
fn runs_a_kernel(registers: &str) -> bool {
    let field = |name: &str| {
        let (_, rest) = registers.split_once(name)?;
        let digits = rest.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(rest.len());
        u64::from_str_radix(rest.get(..digits)?, 16).ok()
    };
    let paging = field("CR0=").is_some_and(|cr0| cr0 & 0x8000_0000 != 0);
    let upper = field("RIP=").is_some_and(|rip| rip >= 0xffff_0000_0000_0000)
        || field("EIP=").is_some_and(|eip| eip >= 0x8000_0000);
    paging && (upper || field("CPL=") == Some(3))
}

/// Follows what QEMU tells of the machine.
pub(super) async fn machine(lab: Arc<Lab>, mut events: Subscription) {
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            exit = lab.vm.wait_exit() => {
                sleep(LAST_WORDS).await;
                let why = exit.reason.map_or_else(|| "without a word".to_owned(), |reason| format!("({reason})"));
                return lab.tell(Event::Broken(format!("QEMU has ended {why}"))).await;
            }
        };
        let told = match event {
            Some(MachineEvent::Reset { by_guest: true }) => Event::Reset,
            Some(MachineEvent::Shutdown { by_guest: true, .. }) => {
                sleep(LAST_WORDS).await;
                Event::Broken("the guest has powered itself off".to_owned())
            }
            Some(MachineEvent::GuestPanicked) => Event::Broken("the guest's kernel panicked".to_owned()),
            Some(MachineEvent::GuestAgent { connected: true }) => Event::Kernel("its guest agent".to_owned()),
            Some(MachineEvent::IoError(error)) => {
                let what = if error.write { "written" } else { "read" };
                Event::Broken(format!("{} cannot be {what}: {}", error.disk, error.reason))
            }
            Some(_) => continue,
            None => return,
        };
        lab.tell(told).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_told_from_firmware_by_where_the_processor_is() {
        let registers = |ip: &str, cpl: u32, cr0: &str| {
            format!(
                "CPU#0\nRAX=0000000000000000 RBX=ff\n{ip} RFL=00000246 [---Z-P-] CPL={cpl} II=0 A20=1\nCR0={cr0} CR2=0"
            )
        };
        assert!(runs_a_kernel(&registers("RIP=ffffffff81e0b4ab", 0, "80050033")));
        assert!(runs_a_kernel(&registers("RIP=fffff80012345678", 0, "80050031")));
        assert!(runs_a_kernel(&registers("RIP=00007f0012345678", 3, "80050033")));
        assert!(runs_a_kernel(&registers("EIP=c0101234", 0, "80050033")));
        assert!(!runs_a_kernel(&registers("EIP=000f1234", 0, "00000011")));
        assert!(!runs_a_kernel(&registers("EIP=ffff1234", 0, "00000011")), "no paging");
        assert!(!runs_a_kernel(&registers("RIP=000000007e123456", 0, "80010033")), "UEFI");
        assert!(!runs_a_kernel("") && !runs_a_kernel("CR0=zz RIP="));
    }
}
