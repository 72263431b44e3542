//! Clients written by others: libnbd's tools and library, QEMU's, fio. A tool that is not installed is a skip that is
//! said, and a failure in CI.

mod common;

use std::sync::Arc;

use common::{Running, path, succeed};
use nbd_server::{Export, MemoryExport, Operation};

const MIB: usize = 1 << 20;

/// A disk of 16 MiB with data in the first three and the tenth.
fn content() -> Vec<u8> {
    let mut content = vec![0; 16 * MIB];
    let mut word = 1_u32;
    for byte in content[..3 * MIB].iter_mut() {
        word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = word.to_be_bytes()[0];
    }
    content[9 * MIB..10 * MIB].fill(0xab);
    content
}

/// Both ways in which reads are answered.
fn servers(content: &[u8]) -> [(Arc<MemoryExport>, Running, String); 2] {
    [MemoryExport::from_bytes(content), MemoryExport::from_bytes(content).not_resident()].map(|disk| {
        let disk = Arc::new(disk);
        let server = Running::start(Arc::clone(&disk) as Arc<dyn Export>);
        let uri = server.uri().to_string();
        (disk, server, uri)
    })
}

#[test]
fn nbdinfo_sees_every_feature_and_the_map() {
    let [(_, _server, uri), _] = servers(&content());
    let Some(json) = succeed("nbdinfo", &["--json", &uri]) else { return };
    for expected in [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"export-size\": 16777216",
        "\"description\": \"a disk in memory\"",
        "\"base:allocation\"",
        "\"memory:written\"",
        "\"is_read_only\": false",
        "\"can_cache\": true",
        "\"can_df\": true",
        "\"can_fast_zero\": true",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"block_size_minimum\": 1",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
    ] {
        assert!(json.contains(expected), "{expected} is not in\n{json}");
    }
    let map = succeed("nbdinfo", &["--map", &uri]).expect("there a moment ago");
    let lines: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        lines,
        [
            vec!["0", "3145728", "0", "data"],
            vec!["3145728", "6291456", "3", "hole,zero"],
            vec!["9437184", "1048576", "0", "data"],
            vec!["10485760", "6291456", "3", "hole,zero"],
        ]
    );
    let list = succeed("nbdinfo", &["--list", "--json", &uri]).expect("there a moment ago");
    assert!(list.contains("\"export-name\": \"disk\""), "{list}");
}

#[test]
fn nbdcopy_copies_both_ways_over_several_connections() {
    let folder = tempfile::tempdir().expect("a folder");
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    std::fs::write(&from, content()).expect("written");
    for (disk, _server, uri) in servers(&vec![7; 16 * MIB]) {
        if succeed("nbdcopy", &["--flush", path(&from), &uri]).is_none() {
            return;
        }
        assert!(disk.content() == content());
        assert!(disk.flushes() > 0);
        succeed("nbdcopy", &["--connections=4", &uri, path(&to)]);
        assert!(std::fs::read(&to).expect("copied") == content());
        succeed("nbdcopy", &["--synchronous", &uri, path(&to)]);
        assert!(std::fs::read(&to).expect("copied") == content());
    }
}

#[test]
fn qemu_img_converts_and_compares() {
    let folder = tempfile::tempdir().expect("a folder");
    let (raw, qcow2) = (folder.path().join("raw"), folder.path().join("qcow2"));
    std::fs::write(&raw, content()).expect("written");
    for (disk, server, uri) in servers(&vec![7; 16 * MIB]) {
        if succeed("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", path(&raw), &uri]).is_none() {
            return;
        }
        assert!(disk.content() == content());
        succeed("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, path(&qcow2)]);
        succeed("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", path(&qcow2), &uri]);
        let statistics = server.table.statistics(&common::name("disk")).expect("there");
        assert!(statistics.count(Operation::BlockStatus).requests > 0);
        assert_eq!(statistics.refused(), 0, "QEMU asks for nothing that is not offered");
    }
}

#[test]
fn qemu_io_writes_patterns_zeroes_and_discards() {
    for (disk, server, uri) in servers(&content()) {
        let commands = [
            "write -P 0x11 1000 5000",
            "read -P 0x11 1000 5000",
            "write -f -P 0x22 4M 64k",
            "write -z -u 9M 512k",
            "write -z 0 64k",
            "read -P 0 0 64k",
            "discard 2M 1M",
            "flush",
            "read -P 0 9M 512k",
            "read -P 0xab 9728k 512k",
        ];
        let mut arguments = vec!["-f", "raw"];
        commands.iter().for_each(|command| arguments.extend(["-c", command]));
        arguments.push(&uri);
        let Some(out) = succeed("qemu-io", &arguments) else { return };
        assert!(!out.contains("failed"), "{out}");
        let mut model = content();
        model[1000..6000].fill(0x11);
        model[4 * MIB..4 * MIB + 65536].fill(0x22);
        model[9 * MIB..9 * MIB + MIB / 2].fill(0);
        model[..65536].fill(0);
        model[2 * MIB..3 * MIB].fill(0);
        assert!(disk.content() == model);
        let statistics = server.table.statistics(&common::name("disk")).expect("there");
        assert!(statistics.count(Operation::Trim).requests > 0 && disk.flushes() > 1);
    }
}

#[test]
fn libnbd_sends_every_command_and_sees_the_errors() {
    let [(disk, _server, uri), _] = servers(&content());
    let script = r#"
h.add_meta_context("base:allocation")
h.add_meta_context("memory:written")
h.set_strict_mode(0)
h.connect_uri(URI)
assert h.pread(10, 9 << 20) == b"\xab" * 10
assert h.pread(4 << 20, 0, nbd.CMD_FLAG_DF)[-1] == 0
h.pwrite(b"x" * 1000, 500, nbd.CMD_FLAG_FUA)
h.zero(100, 600, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_FUA)
h.trim(1 << 20, 1 << 20)
h.cache(4096, 0)
h.flush()
assert h.pread(1000, 500) == b"x" * 100 + b"\0" * 100 + b"x" * 800
seen = {}
h.block_status(16 << 20, 0, lambda name, offset, extents, error: seen.setdefault(name, list(extents)) and 0)
assert sorted(seen) == ["base:allocation", "memory:written"], seen
assert sum(seen["base:allocation"][::2]) == 16 << 20, seen
one = []
h.block_status(16 << 20, 0, lambda name, offset, extents, error: one.append(len(extents)) or 0, nbd.CMD_FLAG_REQ_ONE)
assert one == [2, 2], one
for call, number in [
    (lambda: h.pread(10, (16 << 20) - 5), "EINVAL"),
    (lambda: h.pwrite(b"123", (16 << 20) - 2), "ENOSPC"),
    (lambda: h.trim(10, 16 << 20), "EINVAL"),
    (lambda: h.zero(10, 16 << 20), "ENOSPC"),
]:
    try:
        call()
        raise SystemExit("accepted")
    except nbd.Error as error:
        assert error.errno == number, error
assert h.pread(1, 500) == b"x"
h.shutdown()
print("all good")
"#;
    let set_uri = format!("URI = {uri:?}");
    let Some(out) = succeed("nbdsh", &["-c", &set_uri, "-c", script]) else { return };
    assert!(out.contains("all good"), "{out}");
    assert_eq!(disk.content()[500], b'x');
}

#[test]
fn fio_verifies_what_four_jobs_write_at_depth() {
    let folder = tempfile::tempdir().expect("a folder");
    for (_, _server, uri) in servers(&vec![0; 16 * MIB]) {
        let uri = format!("--uri={uri}");
        let aux = format!("--aux-path={}", path(folder.path()));
        let arguments = [
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randwrite",
            "--bsrange=512-256k",
            "--iodepth=32",
            "--size=4M",
            "--numjobs=4",
            "--offset_increment=4M",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_fatal=1",
            "--fsync=64",
            "--minimal",
            &aux,
        ];
        if succeed("fio", &arguments).is_none() {
            return;
        }
    }
}
