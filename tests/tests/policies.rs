//! Policies that run by themselves: with real guests on a clock that runs faster, and over the domains of a libvirt.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use lifeboat_tests::{Guest, Libvirtd, Running, Sandbox, copy_sparse, guest, have, tool, wait_until};
use serde_json::Value;

/// A program that adds a line to file `name`: what `$words` say, or what it is told.
fn program(sandbox: &Sandbox, name: &str, script: &str) -> String {
    let path = sandbox.path(name);
    fs::write(&path, format!("#!/bin/sh\n{script} >> {}\n", sandbox.name(&format!("{name}.told")))).unwrap();
    tool("chmod", &["755", path.to_str().unwrap()]);
    path.display().to_string()
}

fn told(sandbox: &Sandbox, name: &str) -> Vec<String> {
    let text = fs::read_to_string(sandbox.path(&format!("{name}.told"))).unwrap_or_default();
    text.lines().map(ToOwned::to_owned).collect()
}

/// A service with this configuration, once it answers.
fn serve(sandbox: &Sandbox, config: &str, args: &[&str]) -> Running {
    let file = sandbox.name("lifeboat.toml");
    fs::write(&file, format!("[listen]\naddress = \"127.0.0.1:0\"\ninsecure-http = true\n{config}")).unwrap();
    let service = sandbox.start(&[&["serve", "--config", &file], args].concat());
    assert!(service.line().starts_with("http://127.0.0.1:"));
    wait_until("the socket answers too", || sandbox.path("state/lifeboat.sock").exists());
    service
}

/// A copy of a guest's disk, changed at some places.
fn damaged(sandbox: &Sandbox, name: &str, changes: &[(u64, &[u8])]) -> String {
    let path = sandbox.path(name);
    copy_sparse(&guest(Guest::Oneshot), &path);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    changes.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
    path.display().to_string()
}

#[test]
fn a_policy_by_itself_backs_up_prunes_drills_and_tells_which_machines_do_not_come_up() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let sandbox = Sandbox::with_key_file("key", "64K");
    let counter = guest(Guest::Counter).display().to_string();
    let unbootable = damaged(&sandbox, "unbootable.raw", &[(0, &[0; 440]), (510, &[0; 2])]);
    let rootless = damaged(&sandbox, "rootless.raw", &[((1 << 20) + 1024 + 0x78, b"somebody-elses\0\0")]);
    for _ in 0..3 {
        sandbox.ok(&["backup", "web01", &counter]);
    }
    let alert = program(&sandbox, "alert", "{ cat; echo; }");
    let drilled = program(&sandbox, "drilled", "echo $LIFEBOAT_MACHINE $LIFEBOAT_RESULT $LIFEBOAT_REACHED");
    let recovered = program(&sandbox, "recovered", "echo $LIFEBOAT_RECOVERY $LIFEBOAT_RECOVERY_STATE");
    let config = format!(
        "[alerts]\ncommand = [\"{alert}\"]\nstale-after = \"1h\"\n\
         [hooks]\ndrill = [\"{drilled}\"]\nrecovery = [\"{recovered}\"]\n\
         [policies.minutely]\nschedule = \"* * * * *\"\n\
         [policies.minutely.retention]\nkeep-last = 2\n\
         [policies.minutely.machines]\nweb01.sources = [\"{counter}\"]\nunbootable.sources = [\"{unbootable}\"]\n\
         rootless.sources = [\"{rootless}\"]\n\
         [policies.minutely.machines.patient]\nsources = [\"{counter}\"]\n\
         [policies.minutely.machines.patient.drill]\n\
         expect = [\"never seen\"]\ntimeout = \"6s\"\naccel = \"tcg\"\nmemory = \"512M\"\n\
         [policies.minutely.drill]\nexpect = [\"LIFEBOAT-GUEST: seq 3\"]\nparallel = 4\ntimeout = \"150s\"\n\
         accel = \"tcg\"\nmemory = \"512M\"\n"
    );
    let mut service = serve(&sandbox, &config, &["--clock-speed", "60"]);
    sandbox.ok(&["recover", "web01", "--on", "none", "--name", "looked-at"]);
    sandbox.ok(&["discard", "looked-at"]);
    wait_until("every machine is drilled", || told(&sandbox, "drilled").len() >= 4);
    // The hook on a drill comes before the alert of the policy.
    wait_until("the alerts are told", || {
        told(&sandbox, "alert").iter().filter(|line| line.contains("drill-f")).count() >= 3
    });

    let points = sandbox.json(&["points", "web01"]);
    let points = points.as_array().unwrap();
    assert!(points.len() <= 3, "the policy keeps two, and may have made one more since: {points:?}");
    let drill = points.iter().map(|point| &point["drill"]).find(|drill| !drill.is_null()).unwrap();
    assert!(drill["result"] == "passed" && drill["rto_ms"].as_u64() > Some(0), "{drill}");
    let reports = sandbox.json(&["drills"]);
    let report = |machine: &str| {
        let of = |report: &&Value| report["machine"] == machine;
        reports.as_array().unwrap().iter().find(of).unwrap_or_else(|| panic!("no drill of {machine}: {reports}"))
    };
    for machine in ["web01", "unbootable", "rootless", "patient"] {
        let png = report(machine)["screenshot"].as_str().unwrap();
        assert!(fs::read(png).unwrap().starts_with(b"\x89PNG"), "{machine}");
    }
    let deadline = report("patient")["reason"].as_str().unwrap();
    assert!(deadline.contains("time is up; not seen: console `never seen`"), "{deadline}");
    assert!(report("patient")["seconds"].as_f64().unwrap() >= 6.0);

    let mut lines = told(&sandbox, "drilled");
    lines.truncate(4);
    lines.retain(|line| !line.starts_with("patient failed "));
    lines.sort();
    assert_eq!(lines, ["rootless failed kernel", "unbootable failed boot-loader", "web01 passed ready"]);
    let alerts: Vec<Value> = told(&sandbox, "alert").iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |machine: &str| {
        let found = alerts.iter().find(|alert| alert["alert"] == "drill-failed" && alert["machine"] == machine);
        found.unwrap_or_else(|| panic!("no alert of {machine}: {alerts:?}"))
    };
    assert!(of("unbootable")["title"].as_str().unwrap().contains("boot-loader"));
    let details = of("rootless")["details"].to_string();
    assert!(details.contains("no root file system found") && details.contains("screenshot.png"), "{details}");
    assert!(alerts.iter().all(|alert| alert["alert"] != "run-failed"), "nothing else failed: {alerts:?}");
    // None of them has a point that came up, when the service began to look.
    assert!(alerts.iter().any(|alert| alert["alert"] == "no-fresh-point" && alert["machine"] == "web01"));
    let states: Vec<String> =
        ["publishing", "running", "discarding", "discarded"].map(|state| format!("looked-at {state}")).into();
    assert_eq!(told(&sandbox, "recovered"), states);
    let audit = sandbox.ok(&["audit", "list"]);
    assert!(audit.contains("policy minutely"), "{audit}");
    assert!(service.stop().success());
}

#[test]
fn the_domains_of_a_libvirt_are_backed_up_by_pattern_as_they_are_at_that_time() {
    let sandbox = Sandbox::with_plain_repository("64K");
    let Some(daemon) = Libvirtd::start(&sandbox) else { return };
    let define = |name: &str| {
        let disk = sandbox.path(&format!("{name}.raw"));
        fs::write(&disk, vec![7; 1 << 20]).unwrap();
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64'>hvm</type></os><devices><disk type='file' device='disk'>\
             <driver name='qemu' type='raw'/><source file='{}'/><target dev='vda' bus='virtio'/></disk></devices></domain>",
            disk.display()
        );
        let file = sandbox.path(&format!("{name}.xml"));
        fs::write(&file, xml).unwrap();
        daemon.virsh(&["define", file.to_str().unwrap()]);
    };
    ["web-1", "web-2", "db"].into_iter().for_each(define);
    let config = format!(
        "[policies.daily]\nschedule = \"0 2 * * *\"\nretries = 0\n\
         [policies.daily.libvirt]\ndomains = [\"web-*\"]\nconnect = \"{uri}\"\nlabels = {{ by = \"policy\" }}\n\
         [policies.broken]\nschedule = \"0 3 * * *\"\nretries = 0\n\
         [policies.broken.libvirt]\ndomains = [\"mail-*\"]\nconnect = \"{uri}\"\n",
        uri = daemon.uri()
    );
    let _service = serve(&sandbox, &config, &[]);
    let run = || {
        let run = sandbox.json(&["schedule", "run", "daily"]);
        let step = |step: &Value| format!("{} {} {}", step["what"], step["machine"], step["result"]).replace('"', "");
        run["last"]["steps"].as_array().unwrap().iter().map(step).collect::<Vec<_>>()
    };
    assert_eq!(run(), ["find null done", "backup web-1 done", "backup web-2 done"]);
    // One more of them, found at the next run without another configuration.
    define("web-3");
    daemon.virsh(&["undefine", "web-1"]);
    assert_eq!(run(), ["find null done", "backup web-2 done", "backup web-3 done"]);
    let points = sandbox.json(&["points"]);
    let machines: Vec<&str> =
        points.as_array().unwrap().iter().map(|point| point["machine"].as_str().unwrap()).collect();
    assert_eq!(machines, ["web-1", "web-2", "web-2", "web-3"]);
    assert_eq!(points[0]["labels"]["by"], "policy");
    let said = sandbox.run(&["schedule", "run", "broken"]);
    assert_eq!(said.status.code(), Some(1));
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("find: FAILED") && said.contains("`mail-*`"), "{said}");
}
