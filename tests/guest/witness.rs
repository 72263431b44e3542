//! The program that speaks for a test guest: it says on the console what the guest finds on its disk and what it has
//! made durable there. A line `record N synced` or `seq N` is a promise: it is printed after `fsync` returned, so the
//! disk must still hold that record after anything that may happen to the machine below.
//!
//! Every line starts with `LIFEBOAT-GUEST: `. At each boot, in this order:
//!
//! ```text
//! up boot=3 kernel-uptime=1.07     this is the third boot of this disk
//! records ok 2                     or: records DAMAGED why
//! files ok 320                     or: files DAMAGED name
//! record 3 synced                  or: write failed: why
//! log ok last=212                  (counter) or: log DAMAGED why
//! slots ok 1024                    (counter) or: slots DAMAGED slot N: why
//! seq 213                          (counter) and so on until the power button, or: write failed: why
//! ```
//!
//! A counter step writes one 4 KiB slot in place and syncs it, then appends to the log and syncs that, then prints.
//! Swapped, a crash between the two could leave a logged number whose slot was never written, and a correct disk would
//! be called damaged. `witness slots FILE` makes the slot file when the guest is built.

use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const CONFIG: &str = "/etc/lifeboat-guest.conf";
const CHECKSUMS: &str = "/etc/checksums";
const BOOTS: &str = "/var/log/boots";
const LOG: &str = "/var/log/counter";
const SLOTS: &str = "/var/lib/slots";

const SLOT_LEN: usize = 4096;
const SLOT_COUNT: u64 = 1024;
/// Odd, so that it walks through all slots, and far from neighbour to neighbour.
const SLOT_STRIDE: u64 = 389;

/// `struct input_event` of the kernel on a 64-bit machine: 16 bytes of time, then type, code and value.
const INPUT_EVENT_LEN: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let result = match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => witness(),
        (Some("slots"), Some(path)) => make_slots(&path),
        _ => Err(io::Error::other("usage: witness [slots FILE]")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(format_args!("stopped: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// One line on the console, in one write, so that the kernel's own messages do not cut it.
fn say(text: impl Display) {
    let line = format!("LIFEBOAT-GUEST: {text}\n");
    // A console that takes nothing leaves no way to say so.
    let _ = io::stdout().write_all(line.as_bytes());
}

fn witness() -> io::Result<()> {
    let button = watch_power_button();
    let boots = Journal::check(&fs::read(BOOTS)?);
    let boot = boots.last + 1;
    let uptime = fs::read_to_string("/proc/uptime")?;
    say(format_args!("up boot={boot} kernel-uptime={}", uptime.split(' ').next().unwrap_or("?")));
    match &boots.damage {
        None => say(format_args!("records ok {}", boots.last)),
        Some(why) => say(format_args!("records DAMAGED {why}")),
    }
    check_files()?;
    match append(BOOTS, boot, boots.kept) {
        Ok(()) => say(format_args!("record {boot} synced")),
        Err(error) => say(format_args!("write failed: {error}")),
    }
    let config = fs::read_to_string(CONFIG)?;
    if setting(&config, "mode") == Some("counter") {
        let pause = setting(&config, "interval_ms").and_then(|text| text.parse().ok()).unwrap_or(75);
        count(&button, Duration::from_millis(pause))?;
    }
    Ok(())
}

fn setting<'a>(config: &'a str, name: &str) -> Option<&'a str> {
    config.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

/// Compares the files written when the guest was built with the checksums taken then.
fn check_files() -> io::Result<()> {
    let expected = fs::read_to_string(CHECKSUMS)?.lines().count();
    let output = Command::new("/bin/sha256sum").arg("-c").arg(CHECKSUMS).output()?;
    let report = String::from_utf8_lossy(&output.stdout);
    let good = report.lines().filter(|line| line.ends_with(": OK")).count();
    let mut bad = report.lines().filter(|line| line.ends_with(": FAILED")).peekable();
    if good == expected && output.status.success() {
        say(format_args!("files ok {good}"));
    } else if bad.peek().is_none() {
        say(format_args!("files DAMAGED only {good} of {expected} could be read"));
    }
    for line in bad {
        say(format_args!("files DAMAGED {}", line.trim_end_matches(": FAILED")));
    }
    Ok(())
}

/// Checks what earlier boots left, then counts on until the power button or a failed write.
fn count(button: &AtomicBool, pause: Duration) -> io::Result<()> {
    let log = Journal::check(&fs::read(LOG)?);
    match &log.damage {
        None => say(format_args!("log ok last={}", log.last)),
        Some(why) => say(format_args!("log DAMAGED {why}")),
    }
    check_slots(log.last)?;
    let mut kept = log.kept;
    let mut seq = log.last;
    while !button.load(Ordering::Relaxed) {
        seq += 1;
        if let Err(error) = write_slot(seq).and_then(|()| append(LOG, seq, kept)) {
            // Never retried: after a failed sync nobody knows what the disk holds. The machine waits to be looked at.
            say(format_args!("write failed: {error} at seq {seq}"));
            while !button.load(Ordering::Relaxed) {
                thread::sleep(pause);
            }
            break;
        }
        kept += record(seq).len() as u64;
        say(format_args!("seq {seq}"));
        thread::sleep(pause);
    }
    say("power button");
    Ok(())
}

/// What a journal file of numbered records holds, and where its good part ends.
#[derive(Debug, PartialEq)]
struct Journal {
    last: u64,
    /// Bytes up to the end of the last whole record; a torn tail behind it was never promised and is written over.
    kept: u64,
    damage: Option<String>,
}

impl Journal {
    fn check(bytes: &[u8]) -> Self {
        let mut journal = Self { last: 0, kept: 0, damage: None };
        for line in bytes.split_inclusive(|&byte| byte == b'\n') {
            let expected = journal.last + 1;
            if line != record(expected).as_bytes() {
                // Only a true beginning of the next record can be the rest of a write that was under way.
                let torn_tail = !line.ends_with(b"\n") && record(expected).as_bytes().starts_with(line);
                if !torn_tail {
                    journal.damage = Some(format!("record {expected}: {:?}", String::from_utf8_lossy(line)));
                }
                break;
            }
            journal.last = expected;
            journal.kept += line.len() as u64;
        }
        journal
    }
}

fn record(seq: u64) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64; // FNV-1a
    for byte in seq.to_le_bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("{seq} {hash:016x}\n")
}

fn append(path: &str, seq: u64, at: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    let record = record(seq);
    file.write_all_at(record.as_bytes(), at)?;
    file.set_len(at + record.len() as u64)?;
    file.sync_all()
}

fn slot_of(seq: u64) -> u64 {
    seq.wrapping_mul(SLOT_STRIDE) % SLOT_COUNT
}

/// What slot `slot` holds after step `seq` wrote it; step 0 is the build.
fn slot_bytes(slot: u64, seq: u64) -> Vec<u8> {
    let mut state = (seq << 16 | slot).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(SLOT_LEN);
    bytes.extend_from_slice(&seq.to_le_bytes());
    while bytes.len() < SLOT_LEN {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

fn write_slot(seq: u64) -> io::Result<()> {
    let slot = slot_of(seq);
    let file = OpenOptions::new().write(true).open(SLOTS)?;
    file.write_all_at(&slot_bytes(slot, seq), slot * SLOT_LEN as u64)?;
    file.sync_all()
}

fn make_slots(path: &str) -> io::Result<()> {
    let mut file = File::create(path)?;
    for slot in 0..SLOT_COUNT {
        file.write_all(&slot_bytes(slot, 0))?;
    }
    Ok(())
}

/// The step that wrote `slot` last, when the log ends at `last`; 0 when none did.
fn writer_of(slot: u64, last: u64) -> u64 {
    (last.saturating_sub(SLOT_COUNT - 1)..=last).rev().find(|&seq| seq > 0 && slot_of(seq) == slot).unwrap_or(0)
}

/// Every slot must hold what the last logged step wrote there. The slot of the step after the last may hold anything:
/// that write was under way, and no line promised it.
fn check_slots(last: u64) -> io::Result<()> {
    let file = File::open(SLOTS)?;
    let mut found = vec![0; SLOT_LEN];
    let mut good = 0;
    for slot in 0..SLOT_COUNT {
        let expected = writer_of(slot, last);
        let read = file.read_exact_at(&mut found, slot * SLOT_LEN as u64);
        if let Err(error) = read {
            say(format_args!("slots DAMAGED slot {slot}: {error}"));
        } else if found == slot_bytes(slot, expected) || slot == slot_of(last + 1) {
            good += 1;
        } else {
            let holds = found.first_chunk().map_or(0, |head| u64::from_le_bytes(*head));
            say(format_args!("slots DAMAGED slot {slot}: should be of step {expected}, begins like step {holds}"));
        }
    }
    if good == SLOT_COUNT {
        say(format_args!("slots ok {good}"));
    }
    Ok(())
}

/// Sets the flag once the ACPI power button is pressed. A machine without one counts for ever.
fn watch_power_button() -> Arc<AtomicBool> {
    let pressed = Arc::new(AtomicBool::new(false));
    for number in 0..8 {
        if let Ok(device) = File::open(format!("/dev/input/event{number}")) {
            let pressed = Arc::clone(&pressed);
            thread::spawn(move || wait_for_press(device, &pressed));
        }
    }
    pressed
}

fn wait_for_press(mut device: File, pressed: &AtomicBool) {
    let mut event = [0; INPUT_EVENT_LEN];
    while device.read_exact(&mut event).is_ok() {
        if is_power_press(&event) {
            pressed.store(true, Ordering::Relaxed);
        }
    }
}

fn is_power_press(event: &[u8; INPUT_EVENT_LEN]) -> bool {
    let kind = u16::from_le_bytes([event[16], event[17]]);
    let code = u16::from_le_bytes([event[18], event[19]]);
    let value = i32::from_le_bytes([event[20], event[21], event[22], event[23]]);
    kind == EV_KEY && code == KEY_POWER && value == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(seqs: impl IntoIterator<Item = u64>) -> Vec<u8> {
        seqs.into_iter().map(record).collect::<String>().into_bytes()
    }

    #[test]
    fn a_whole_journal_is_good_to_its_last_record() {
        let bytes = journal(1..=12);
        let expected = Journal { last: 12, kept: bytes.len() as u64, damage: None };
        assert_eq!(Journal::check(&bytes), expected);
        assert_eq!(Journal::check(&[]), Journal { last: 0, kept: 0, damage: None });
    }

    #[test]
    fn a_torn_tail_is_cut_and_is_no_damage() {
        let whole = journal(1..=4);
        let kept = journal(1..=3).len();
        for end in kept..whole.len() {
            let expected = Journal { last: 3, kept: kept as u64, damage: None };
            assert_eq!(Journal::check(&whole[..end]), expected, "cut at {end}");
        }
    }

    #[test]
    fn every_changed_byte_and_every_gap_is_damage() {
        let whole = journal(1..=4);
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x04;
            assert!(Journal::check(&bytes).damage.is_some(), "byte {at}");
        }
        assert!(Journal::check(&journal([1, 2, 4])).damage.is_some());
        assert!(Journal::check(&journal([2, 3])).damage.is_some());
        let mut zeroes = whole;
        zeroes.extend_from_slice(&[0; 30]);
        assert!(Journal::check(&zeroes).damage.is_some());
    }

    #[test]
    fn the_last_writer_of_a_slot_is_found_among_the_last_round() {
        for last in [0, 1, 7, 1023, 1024, 1025, 5000] {
            let mut writers = vec![0; 1024];
            for seq in 1..=last {
                writers[usize::try_from(slot_of(seq)).expect("a slot number is small")] = seq;
            }
            for (slot, writer) in (0..).zip(writers) {
                assert_eq!(writer_of(slot, last), writer, "slot {slot}, last {last}");
            }
        }
    }

    #[test]
    fn slots_differ_by_place_and_step() {
        assert_eq!(slot_bytes(3, 9).len(), SLOT_LEN);
        assert_ne!(slot_bytes(3, 9), slot_bytes(4, 9));
        assert_ne!(slot_bytes(3, 9), slot_bytes(3, 10));
    }

    #[test]
    fn only_a_press_of_the_power_key_counts() {
        let mut event = [0; INPUT_EVENT_LEN];
        event[16] = 1;
        event[18] = 116;
        assert!(!is_power_press(&event), "released");
        event[20] = 1;
        assert!(is_power_press(&event));
        event[18] = 30;
        assert!(!is_power_press(&event), "another key");
    }
}
