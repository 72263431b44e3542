//! A domain on another host: its disks are served there over TLS, and move to storage that both hosts reach.

use std::fs;
use std::process::{Command, Stdio};

use lifeboat_tests::{Foreign, Guest, Libvirtd, Sandbox, guest, have, holds_all, wait_for_domain, wait_until};

#[test]
fn a_domain_on_another_host_runs_on_disks_served_by_tls_and_moves_to_an_nbd_server() {
    if !have(&["qemu-system-x86_64", "nbdkit"]) {
        return;
    }
    let sandbox = Sandbox::with_plain_repository("64K");
    let pki = sandbox.name("pki");
    sandbox.ok(&["tls", &pki, "--host", "here,127.0.0.1", "--host", "there"]);
    let Some(mut daemon) = Libvirtd::elsewhere(&sandbox, &sandbox.path("pki/there")) else { return };
    sandbox.ok(&["backup", "vm", &guest(Guest::Counter).display().to_string()]);
    let (on, tls) = (format!("libvirt:{}", daemon.uri()), sandbox.name("pki/here"));
    let recover = ["recover", "vm", "--on", &on];
    let refused = sandbox.fails(5, &recover);
    assert!(refused.contains("another host") && refused.contains("--serve-on"), "{refused}");
    for bad in ["unix:/x", "tcp:0.0.0.0:0", "tcp:192.0.2.1:0", "elsewhere"] {
        let refused = sandbox.fails(2, &[&recover[..], &["--serve-on", bad]].concat());
        assert!(refused.contains("serve"), "{bad}: {refused}");
    }
    let refused = sandbox.fails(2, &["recover", "vm", "--serve-on", "tcp:127.0.0.1:0", "--on", "none"]);
    assert!(refused.contains("on this host"), "{refused}");
    assert!(sandbox.json(&["recoveries"]).as_array().is_some_and(Vec::is_empty));

    let (view, _) = daemon.recover(&sandbox, &["--serve-on", "tcp:127.0.0.1:0", "--tls-dir", &tls, "--persistent"]);
    let uri = view["disks"][0]["nbd_uri"].clone();
    assert!(uri.as_str().is_some_and(|uri| uri.starts_with("nbds://127.0.0.1:")), "{view}");
    assert!(view["console"].is_null() && view["pid"].is_null(), "{view}");
    let made = daemon.virsh(&["dumpxml", "vm"]);
    assert!(made.contains("tls='yes'") && !made.contains(&sandbox.name("state/recoveries/vm/console")), "{made}");
    // The guest is up and says so through its agent, past libvirt on the other host.
    wait_until("the agent answers", || sandbox.json(&["commit", "vm"])["consistency"] == "application");

    // The same address after a restart; the domain is found again, and one that waits for libvirt is not lost.
    sandbox.kill_owner();
    let after = sandbox.json(&["recovery", "vm"]);
    assert_eq!((&after["state"], &after["disks"][0]["nbd_uri"]), (&"running".into(), &uri), "{after}");
    wait_until("the guest goes on", || sandbox.json(&["commit", "vm"])["consistency"] == "application");
    daemon.kill();
    daemon.start_again();
    wait_for_domain(&daemon, "vm", "running");

    let refused = sandbox.fails(5, &["rehydrate", "vm", "--to", &sandbox.name("local.raw")]);
    assert!(refused.contains("does not reach") && !sandbox.path("local.raw").exists(), "{refused}");
    let served = sandbox.name("served.raw");
    assert!(fs::File::create(&served).and_then(|file| file.set_len(256 << 20)).is_ok());
    let port = lifeboat_tests::free_port().to_string();
    let mut server = Command::new("nbdkit");
    server.args(["--foreground", "--exit-with-parent", "--ipaddr", "127.0.0.1", "--port", &port, "file", &served]);
    let _server = Foreign::start(server.stderr(Stdio::null()));
    wait_until("nbdkit listens", || std::net::TcpStream::connect(format!("127.0.0.1:{port}")).is_ok());
    sandbox.ok(&["rehydrate", "vm", "--to", &format!("nbd://127.0.0.1:{port}")]);
    assert_eq!(sandbox.json(&["recovery", "vm"])["rehydration"]["mode"], "mirror");
    sandbox.ok(&["cutover", "vm"]);
    let kept = daemon.virsh(&["dumpxml", "--inactive", "vm"]);
    assert!(kept.contains(&format!("port='{port}'")) && !kept.contains("tls"), "{kept}");
    sandbox.ok(&["discard", "vm"]);
    assert!(daemon.knows("vm"), "a domain in production stays when its recovery ends");
    daemon.virsh(&["destroy", "vm"]);
    holds_all(&sandbox, &served, 1);
    daemon.virsh(&["undefine", "vm"]);
}
