//! The NBD server as the real program runs it: TLS, what it tells of its exports, and clients that mean no good.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use lifeboat_tests::{Running, Sandbox, have, noise, raw, tool, tool_output, wait_until};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;

/// A repository with one point of a disk, and that disk.
fn with_point() -> (Sandbox, String) {
    let sandbox = Sandbox::with_repository();
    let disk = sandbox.name("disk.raw");
    let file = File::create(&disk).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(&noise(1, 8 << 20), 0).unwrap();
    sandbox.ok(&["backup", "web01", &disk]);
    (sandbox, disk)
}

/// The URI that an export prints, for a client with these certificates.
fn secure(export: &Running, certificates: &str) -> String {
    let uri = export.line().replace("127.0.0.1", "localhost");
    assert!(uri.starts_with("nbds://localhost:"), "{uri}");
    format!("{uri}?tls-certificates={certificates}")
}

#[test]
fn an_export_with_tls_serves_who_has_a_certificate_and_nobody_else() {
    if !have(&["nbdcopy", "nbdinfo"]) {
        return;
    }
    let (sandbox, disk) = with_point();
    let pki = sandbox.name("pki");
    sandbox.ok(&["tls", &pki, "--host", "localhost,127.0.0.1", "--host", "rescue.example"]);
    let (server, rescue) = (format!("{pki}/localhost"), format!("{pki}/rescue.example"));
    let listen = ["export", "web01", "--listen", "tcp:127.0.0.1:0", "--tls-dir", &server];
    let export = sandbox.start(&[&listen[..], &["--tls-client", "rescue.example"]].concat());
    let uri = secure(&export, &rescue);
    let copy = sandbox.name("copy.raw");
    tool("nbdcopy", &[&uri, &copy]);
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(&disk).unwrap());
    // Another name, no TLS, no certificate.
    let plain = uri.replace("nbds:", "nbd:");
    let bare = sandbox.path("bare");
    std::fs::create_dir(&bare).unwrap();
    std::fs::copy(format!("{server}/ca-cert.pem"), bare.join("ca-cert.pem")).unwrap();
    for refused in [uri.replace(&rescue, &server), plain, uri.replace(&rescue, &bare.display().to_string())] {
        assert!(!tool_output("nbdinfo", &["--size", &refused]).status.success(), "{refused}");
    }
    // A backup through it, by our own client and with a path that is relative.
    let mut command = sandbox.command(&["backup", "copy", &uri.replace(&pki, "pki")]);
    assert!(command.current_dir(sandbox.path("")).status().unwrap().success());
    let again = sandbox.name("again.raw");
    sandbox.ok(&["restore", "copy", "--to", &again]);
    assert!(std::fs::read(&again).unwrap() == std::fs::read(&disk).unwrap());
    drop(export);
    // Anonymous clients have to be let in by name.
    let open = sandbox.start(&[&listen[..], &["--tls-anonymous-clients"]].concat());
    let uri = secure(&open, &bare.display().to_string());
    assert_eq!(tool("nbdinfo", &["--size", &uri]).trim(), SIZE.to_string());
}

#[test]
fn each_disk_has_its_own_list_of_clients() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let (sandbox, disk) = with_point();
    sandbox.ok(&["backup", "db01", &format!("system={disk}"), &format!("data={disk}")]);
    let pki = sandbox.name("pki");
    sandbox.ok(&["tls", &pki, "--host", "localhost", "--host", "one.example", "--host", "two.example"]);
    let listen = ["export", "db01", "--listen", "tcp:127.0.0.1:0", "--tls-dir", &format!("{pki}/localhost")];
    let said = sandbox.fails(2, &[&listen[..], &["--tls-client", "nowhere=one.example"]].concat());
    assert!(said.contains("`nowhere` is not served") && said.contains("system, data"), "{said}");
    let said = sandbox.fails(2, &[&listen[..], &["--tls-client", "data=one.example"]].concat());
    assert!(said.contains("no client may use disk system"), "{said}");
    let clients = ["--tls-client", "data=one.example", "--tls-client", "two.example"];
    let export = sandbox.start(&[&listen[..], &clients].concat());
    let (system, data) = (export.line(), export.line());
    for (uri, host, opens) in [
        (&system, "one.example", false),
        (&data, "one.example", true),
        (&system, "two.example", true),
        (&data, "two.example", true),
        (&data, "localhost", false),
    ] {
        let uri = uri.replace("127.0.0.1", "localhost");
        let found = tool_output("nbdinfo", &["--size", &format!("{uri}?tls-certificates={pki}/{host}")]);
        assert_eq!(found.status.success(), opens, "{host} on {uri}: {found:?}");
    }
}

#[test]
fn what_would_be_insecure_or_makes_no_sense_is_refused() {
    let (sandbox, _) = with_point();
    let listen = ["export", "web01", "--listen", "tcp:0.0.0.0:0"];
    let said = sandbox.fails(5, &listen);
    assert!(said.contains("not a loopback address") && said.contains("--tls-dir"), "{said}");
    let said = sandbox.fails(2, &[&listen[..], &["--insecure-tcp", "tcp:1.2.3.4:5"]].concat());
    assert!(said.contains("--insecure-tcp tcp:0.0.0.0:0"), "{said}");
    let said = sandbox.fails(4, &[&listen[..], &["--tls-dir", "/nonexistent"]].concat());
    assert!(said.contains("/nonexistent/ca-cert.pem") && said.contains("lifeboat tls"), "{said}");
    sandbox.fails(2, &[&listen[..], &["--tls-anonymous-clients"]].concat());
    sandbox.fails(2, &["tls", &sandbox.name("pki"), "--host", "a/b"]);
    let meant = sandbox.start(&[&listen[..], &["--insecure-tcp", "tcp:0.0.0.0:0"]].concat());
    assert!(meant.line().starts_with("nbd://0.0.0.0:"));
}

#[test]
fn what_clients_ask_for_is_told_by_recovery_and_metrics() {
    if !have(&["qemu-io", "curl"]) {
        return;
    }
    let (sandbox, _) = with_point();
    let view = sandbox.json(&["recover", "web01", "--on", "none"]);
    let uri = view["disks"][0]["nbd_uri"].as_str().unwrap();
    assert_eq!(view["disks"][0]["served"]["reads"], 0);
    tool("qemu-io", &["-f", "raw", uri, "-c", "read 0 1M", "-c", "write 2M 64k", "-c", "flush"]);
    let view = sandbox.json(&["recovery", "web01"]);
    let served = &view["disks"][0]["served"];
    assert!(served["read_bytes"].as_u64().unwrap() >= MIB, "{served}");
    assert!(served["write_bytes"].as_u64().unwrap() >= 64 << 10, "{served}");
    assert!(served["flushes"].as_u64().unwrap() >= 1 && served["read_p99_us"].is_u64(), "{served}");
    assert_eq!(served["errors"], 0);
    assert!(sandbox.ok(&["recovery", "web01"]).contains("FLUSHES"));
    let socket = sandbox.name("state/lifeboat.sock");
    let metrics = tool("curl", &["-s", "--unix-socket", &socket, "http://lifeboat/metrics"]);
    let line = r#"lifeboat_export_requests_total{recovery="web01",export="disk0",operation="write"} "#;
    let writes = metrics.lines().find_map(|text| text.strip_prefix(line)).unwrap();
    assert!(writes.parse::<u64>().unwrap() >= 1);
    assert!(metrics.ends_with("# EOF\n"));
    sandbox.ok(&["discard", "web01"]);
}

/// Memory that a process has in use, in bytes.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
}

fn transmitting(socket: &Path) -> Option<UnixStream> {
    raw::transmitting(socket, "disk0").ok()
}

fn request(command: u8, length: u32) -> Vec<u8> {
    raw::request(command, 0, length)
}

#[test]
fn clients_that_mean_no_good_cost_little_and_keep_nobody_out() {
    const GROWTH_MAX: u64 = 160 << 20;
    let mut files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    files.current = files.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, files).unwrap();
    let (sandbox, _) = with_point();
    let (_export, uri) = sandbox.export(&["web01"]);
    let socket = sandbox.path("nbd.sock");
    assert!(uri.contains("disk0"));
    let served = || {
        let mut good = transmitting(&socket).expect("a client in its right gets in");
        good.write_all(&request(0, 4096)).unwrap();
        let mut reply = [0; 16 + 4096];
        good.read_exact(&mut reply).unwrap();
        assert!(reply[16..] == noise(1, 4096)[..]);
    };
    served();
    let pid = sandbox.owner().unwrap();
    let before = resident(pid);
    let flat = |what: &str| {
        let now = resident(pid);
        assert!(now < before + GROWTH_MAX, "{what}: {} MiB, then {} MiB", before >> 20, now >> 20);
        served();
    };

    // A thousand that connect and say nothing, or half of something.
    let half_open: Vec<UnixStream> = (0..1000)
        .map(|number| {
            let mut stream = raw::connect(&socket);
            let said: &[u8] =
                [&b""[..], b"\0\0", b"\0\0\0\x03IHAVEO", b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\xff\xff"][number % 4];
            // It may have been told to go already.
            let _ = stream.write_all(said);
            stream
        })
        .collect();
    flat("half-open connections");
    drop(half_open);

    // A thousand that are in and ask for nothing.
    let idle: Vec<UnixStream> = (0..1000).filter_map(|_| transmitting(&socket)).collect();
    assert_eq!(idle.len(), 1000);
    flat("idle clients");
    drop(idle);

    // Lengths that nobody has.
    wait_until("places are free again", || transmitting(&socket).is_some());
    let hostile: Vec<UnixStream> = (0..64)
        .map(|number| {
            let mut stream = transmitting(&socket).unwrap();
            let lengths = [u32::MAX, 1 << 31, (32 << 20) + 1, 32 << 20];
            stream.write_all(&request(1, lengths[number % 4])).unwrap();
            stream
        })
        .collect();
    flat("announced payloads");
    drop(hostile);
    for data in
        [&b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"[..], b"IHAVEOPT\0\0\0\x0a\0\0\0\x0a\xff\xff\xff\xff\0\0\0\0\0\0"]
    {
        let mut stream = raw::connect(&socket);
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&[b"\0\0\0\x03", data].concat()).unwrap();
        flat("options with lengths that nobody has");
    }

    // One that asks for much and takes nothing.
    let mut deaf = transmitting(&socket).unwrap();
    deaf.set_nonblocking(true).unwrap();
    let ask = request(0, 1 << 20);
    for _ in 0..50_000 {
        // It is not read from any more at some time.
        if deaf.write(&ask).is_err() {
            break;
        }
    }
    flat("replies that nobody takes");

    // One that speaks a byte at a time is answered all the same.
    let mut slow = raw::connect(&socket);
    slow.read_exact(&mut [0; 18]).unwrap();
    for byte in b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x05disk0" {
        slow.write_all(&[*byte]).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    slow.read_exact(&mut [0; 10]).unwrap();
    for byte in request(0, 512) {
        slow.write_all(&[byte]).unwrap();
    }
    slow.read_exact(&mut [0; 16 + 512]).unwrap();
    flat("a byte at a time");
}
