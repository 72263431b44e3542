//! Images made by qemu-img, read here and compared byte for byte with what qemu-img itself reads; and images made
//! here, judged by qemu-img.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test says what it skips, and fails by panicking")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use images::{BackingFiles, DiskImage, Format, OpenError, OpenOptions, Overwrite, TargetError, TargetFormat};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// Whether qemu-img is here; a test that needs it is skipped without, and fails in CI.
fn qemu_img_is_here() -> bool {
    let here = Command::new("qemu-img").arg("--version").output().is_ok();
    assert!(here || std::env::var_os("CI").is_none(), "qemu-img is missing");
    if !here {
        println!("skipped: qemu-img is missing");
    }
    here
}

fn run(program: &str, args: &[&str], dir: &Path) {
    let output = Command::new(program).args(args).current_dir(dir).output().expect("it is installed");
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn qemu_img(dir: &TempDir, args: &[&str]) {
    run("qemu-img", args, dir.path());
}

/// Bytes that neither repeat nor compress away wholly.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state & 0x1f).to_le_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}

/// A sparse raw disk: data at the start, in the middle, at an odd place and at the very end.
fn raw_disk(dir: &TempDir, name: &str, size: u64, seed: u64) -> PathBuf {
    let path = dir.path().join(name);
    let file = File::create(&path).unwrap();
    file.set_len(size).unwrap();
    for (number, at) in [0, size / 2, size / 3 + 512, size.saturating_sub(70_000)].into_iter().enumerate() {
        file.write_all_at(&noise(seed + number as u64, 70_000), at).unwrap();
    }
    file.set_len(size).unwrap();
    path
}

fn open(path: &Path) -> Result<Box<dyn DiskImage>, OpenError> {
    images::open(path, &OpenOptions::default())
}

/// The whole disk, read in pieces of odd sizes.
fn contents(image: &dyn DiskImage) -> Vec<u8> {
    let mut bytes = vec![0_u8; usize::try_from(image.size()).unwrap()];
    let mut at = 0;
    for part in bytes.chunks_mut(99_999) {
        image.read_at(at, part).unwrap();
        at += part.len() as u64;
    }
    bytes
}

/// The same through `next_data`: what it passes over has to be zeroes.
fn contents_by_extents(image: &dyn DiskImage) -> Vec<u8> {
    let mut bytes = vec![0_u8; usize::try_from(image.size()).unwrap()];
    let mut at = 0;
    while let Some(range) = image.next_data(at).unwrap() {
        assert!(range.start >= at && range.end > range.start && range.end <= image.size(), "{range:?}");
        let part = &mut bytes[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
        image.read_at(range.start, part).unwrap();
        at = range.end;
    }
    bytes
}

fn assert_reads_as_qemu_reads(dir: &TempDir, name: &str) {
    qemu_img(dir, &["convert", "-O", "raw", name, "expected.raw"]);
    let expected = fs::read(dir.path().join("expected.raw")).unwrap();
    let image = open(&dir.path().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(image.size(), expected.len() as u64, "{name}");
    assert!(contents(image.as_ref()) == expected, "{name} reads differently");
    assert!(contents_by_extents(image.as_ref()) == expected, "{name} has data where it shows holes");
    assert_eq!(image.current_size().unwrap(), image.size());
}

#[test]
fn holes_of_a_raw_file_are_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw_disk(&dir, "a.raw", 64 * MIB, 1);
    let image = open(&path).unwrap();
    assert!(contents(image.as_ref()) == fs::read(&path).unwrap());
    assert!(contents_by_extents(image.as_ref()) == fs::read(&path).unwrap());
    let (mut at, mut data) = (0, 0);
    while let Some(range) = image.next_data(at).unwrap() {
        data += range.end - range.start;
        at = range.end;
    }
    assert!(data < MIB, "{data} bytes of data in a disk with 280 kB of it");
}

#[test]
fn every_kind_of_qcow2_that_is_taken_reads_as_qemu_reads_it() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    raw_disk(&dir, "a.raw", 9 * MIB + 512, 2);
    for (number, options) in [
        &["-o", "compat=0.10"][..],
        &["-o", "compat=1.1"],
        &["-c"],
        &["-c", "-o", "cluster_size=2M"],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=2M"],
        &["-o", "lazy_refcounts=on"],
        &["-S", "0"],
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("{number}.qcow2");
        let mut args = vec!["convert", "-O", "qcow2"];
        args.extend(options);
        args.extend(["a.raw", &name]);
        qemu_img(&dir, &args);
        assert_reads_as_qemu_reads(&dir, &name);
    }
}

#[test]
fn a_chain_of_backing_files_of_different_sizes_reads_as_one_disk() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    raw_disk(&dir, "base.raw", 5 * MIB, 3);
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2", "8M"]);
    run(
        "qemu-io",
        &["-c", "write -P 7 1M 300k", "-c", "write -z 64k 64k", "-c", "write -P 9 6M 4k", "mid.qcow2"],
        dir.path(),
    );
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "6M"]);
    run("qemu-io", &["-c", "write -P 5 1100k 10k", "top.qcow2"], dir.path());
    for name in ["mid.qcow2", "top.qcow2"] {
        assert_reads_as_qemu_reads(&dir, name);
    }
    let refused = OpenOptions { backing_files: BackingFiles::Refuse, ..OpenOptions::default() };
    let error = images::open(&dir.path().join("top.qcow2"), &refused).err().unwrap();
    assert!(matches!(&error, OpenError::BackingFile { backing, .. } if backing == "mid.qcow2"), "{error}");
    fs::remove_file(dir.path().join("base.raw")).unwrap();
    let error = open(&dir.path().join("top.qcow2")).err().unwrap();
    assert!(error.to_string().contains("base.raw"), "{error}");
}

#[test]
fn a_chain_that_bites_its_tail_ends() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2"]);
    qemu_img(&dir, &["rebase", "-u", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2"]);
    let error = open(&dir.path().join("b.qcow2")).err().unwrap();
    assert!(error.to_string().contains("loop"), "{error}");
}

#[test]
fn what_is_not_read_here_is_named_for_qemu() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    raw_disk(&dir, "a.raw", 4 * MIB, 4);
    for (format, options, expected) in [
        ("qcow2", "compression_type=zstd", "qcow2"),
        ("qcow2", "extended_l2=on", "qcow2"),
        ("qcow2", "data_file=data.raw", "qcow2"),
        ("vmdk", "subformat=streamOptimized", "vmdk"),
        ("vmdk", "subformat=monolithicSparse", "vmdk"),
        ("vmdk", "subformat=monolithicFlat", "vmdk"),
        ("vhdx", "subformat=dynamic", "vhdx"),
        ("vpc", "subformat=dynamic", "vpc"),
        ("vdi", "static=off", "vdi"),
        ("qcow", "encryption=off", "qcow"),
    ] {
        let compressed: &[&str] = if options.contains("zstd") { &["-c"] } else { &[] };
        // An external data file is believed of an image that is named like one.
        let name = match format {
            "vmdk" => "b.vmdk",
            _ if options.contains("data_file") => "b.qcow2",
            _ => "b.img",
        };
        let args = [&["convert", "-O", format, "-o", options], compressed, &["a.raw", name]].concat();
        qemu_img(&dir, &args);
        match open(&dir.path().join(name)).err() {
            Some(OpenError::Unsupported { format, .. }) if format == expected => {}
            other => panic!("{format} {options}: {other:?}"),
        }
        // A file that is named raw is raw.
        let raw = dir.path().join("b.RAW");
        fs::rename(dir.path().join(name), &raw).unwrap();
        let image = open(&raw).unwrap();
        assert_eq!((image.describe(), image.size()), ("raw".to_owned(), fs::metadata(&raw).unwrap().len()));
    }
}

#[test]
fn what_a_guest_wrote_to_its_disk_brings_no_file_of_the_host() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("secret"), "what only the host may read").unwrap();
    let backing = &["-b", "secret", "-F", "raw", "-u"][..];
    for (format, options, size, names) in [
        ("qcow2", backing, "1M", "a backing file"),
        ("qcow2", &["-o", "compat=0.10", "-b", "secret", "-F", "raw", "-u"], "1M", "a backing file"),
        ("qcow2", &["-o", "data_file=data"], "1M", "an external data file"),
        ("qcow", &["-b", "secret", "-F", "raw", "-u"], "1M", "a backing file"),
        ("qed", backing, "1M", "a backing file"),
    ] {
        qemu_img(&dir, &[&["create", "-q", "-f", format], options, &["made", size]].concat());
        let header = fs::read(dir.path().join("made")).unwrap();
        // `.qcow2` in the middle says nothing.
        for name in ["disk.img", "disk", "disk.qcow2.bak", "qcow2"] {
            let path = dir.path().join(name);
            fs::write(&path, &header).unwrap();
            match open(&path).err() {
                Some(OpenError::Uncertain { format: like, names: kind, .. }) if like == format && kind == names => {}
                other => panic!("{name}, {options:?}: {other:?}"),
            }
            let error = open(&path).err().unwrap().to_string();
            assert!(error.contains("uncertain") && error.contains("has to be given, raw or"), "{error}");
            let raw = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
            assert!(contents(images::open(&path, &raw).unwrap().as_ref()) == header);
        }
        for name in ["disk.raw", "disk.RAW", "disk.qcow2.raw"] {
            fs::write(dir.path().join(name), &header).unwrap();
            assert!(contents(open(&dir.path().join(name)).unwrap().as_ref()) == header, "{name}");
        }
        for name in ["disk.qcow2", "disk.QCOW2", "disk.qcow", "disk.qed"] {
            fs::write(dir.path().join(name), &header).unwrap();
            let error = open(&dir.path().join(name)).err();
            assert!(matches!(error, None | Some(OpenError::Unsupported { .. })), "{name}, {options:?}: {error:?}");
        }
    }
}

#[test]
fn an_image_that_names_no_file_is_known_by_its_content() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "alone.img", "1M"]);
    assert_eq!(open(&dir.path().join("alone.img")).unwrap().describe(), "qcow2");
    // Told its format, an image may name what it likes, and what it names needs no particular name.
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-b", "alone.img", "-F", "qcow2", "mid.img"]);
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-b", "mid.img", "-F", "qcow2", "top.img"]);
    let top = dir.path().join("top.img");
    assert!(matches!(open(&top).err(), Some(OpenError::Uncertain { .. })));
    let qcow2 = OpenOptions { format: Some(Format::Qcow2), ..OpenOptions::default() };
    assert_eq!(images::open(&top, &qcow2).unwrap().size(), MIB);
    fs::rename(&top, dir.path().join("top.qcow2")).unwrap();
    assert_eq!(open(&dir.path().join("top.qcow2")).unwrap().size(), MIB);
}

#[test]
fn damaged_images_fail_or_read_but_never_panic_or_hang() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    raw_disk(&dir, "a.raw", 4 * MIB, 5);
    qemu_img(&dir, &["convert", "-c", "-O", "qcow2", "a.raw", "good.qcow2"]);
    let good = fs::read(dir.path().join("good.qcow2")).unwrap();
    let path = dir.path().join("bad.qcow2");
    let look = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let Ok(image) = open(&path) else { return };
        if image.size() > 1 << 40 {
            return;
        }
        let mut at = 0;
        let mut buf = vec![0_u8; 65536];
        while let Ok(Some(range)) = image.next_data(at) {
            let length = (range.end - range.start).min(65536);
            // An error is as good as an answer here.
            let _ = image.read_at(range.start, &mut buf[..usize::try_from(length).unwrap()]);
            at = range.start + length;
            if at > 64 * MIB {
                break;
            }
        }
    };
    for cut in [0, 3, 71, 103, 512, 65_535, 65_536, 200_000, good.len() - 1] {
        look(&good[..cut.min(good.len())]);
    }
    for round in 0..200_u64 {
        let mut bytes = good.clone();
        let places = noise(round + 100, 12);
        for pair in places.chunks(3) {
            // Headers and tables stand at the beginning of each of the first clusters.
            let at = usize::from(pair[0] % 5) * 65_536 + usize::from(pair[1]) * 8 + usize::from(pair[2] % 8);
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << (pair[2] % 8);
            }
        }
        look(&bytes);
    }
}

#[test]
fn what_cannot_be_a_disk_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let error = open(&dir.path().join("none")).err().unwrap();
    assert!(error.to_string().contains("none"), "{error}");
    let error = open(dir.path()).err().unwrap();
    assert!(error.to_string().contains("a folder"), "{error}");
    let error = open(Path::new("/dev/zero")).err().unwrap();
    assert!(error.to_string().contains("a character device"), "{error}");
    run("mkfifo", &["pipe"], dir.path());
    let error = open(&dir.path().join("pipe")).err().unwrap();
    assert!(error.to_string().contains("a pipe"), "{error}");
    fs::write(dir.path().join("empty"), "").unwrap();
    assert_eq!(open(&dir.path().join("empty")).unwrap().size(), 0);
}

#[test]
fn a_file_that_shrinks_is_an_error_not_a_hang() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw_disk(&dir, "a.raw", 4 * MIB, 6);
    let image = open(&path).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(MIB).unwrap();
    let error = image.read_at(2 * MIB, &mut [0_u8; 4096]).unwrap_err();
    assert!(error.to_string().contains("ends before"), "{error}");
    assert_eq!(image.current_size().unwrap(), MIB);
    assert_eq!(image.next_data(2 * MIB).unwrap(), None);
}

#[test]
fn a_forced_format_is_believed() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    let path = dir.path().join("a.qcow2");
    let raw = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    assert_eq!(images::open(&path, &raw).unwrap().size(), fs::metadata(&path).unwrap().len());
    let plain = raw_disk(&dir, "a.raw", MIB, 7);
    let qcow2 = OpenOptions { format: Some(Format::Qcow2), ..OpenOptions::default() };
    assert!(matches!(images::open(&plain, &qcow2), Err(OpenError::Damaged { .. })));
}

/// Writes the disk at `source` in a scattered order from several threads, holes left out.
fn write_out(source: &Path, target: &dyn images::ImageTarget) {
    let bytes = fs::read(source).unwrap();
    let pieces: Vec<(usize, &[u8])> = bytes.chunks(65_536).enumerate().collect();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let pieces = &pieces;
            scope.spawn(move || {
                for (number, piece) in pieces.iter().rev().filter(|(number, _)| number % 4 == thread) {
                    if piece.iter().any(|byte| *byte != 0) {
                        target.write_at(*number as u64 * 65_536, piece).unwrap();
                    }
                }
            });
        }
    });
}

#[test]
fn written_targets_hold_the_disk_and_please_qemu() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = raw_disk(&dir, "a.raw", 33 * MIB + 512, 8);
    for (name, format) in [("out.raw", TargetFormat::Raw), ("out.qcow2", TargetFormat::Qcow2)] {
        let path = dir.path().join(name);
        let target = images::create_target(&path, format, 33 * MIB + 512, Overwrite::Refuse).unwrap();
        assert!(target.starts_zeroed());
        write_out(&source, target.as_ref());
        assert!(!path.exists(), "it has its name before it is whole");
        target.finish().unwrap();
        if format == TargetFormat::Qcow2 {
            qemu_img(&dir, &["check", name]);
        }
        qemu_img(
            &dir,
            &["compare", "-f", "raw", "-F", if format == TargetFormat::Raw { "raw" } else { "qcow2" }, "a.raw", name],
        );
        let on_disk = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&path).unwrap()) * 512;
        assert!(on_disk < 2 * MIB, "{name} takes {on_disk} bytes");
    }
    let error =
        images::create_target(&dir.path().join("out.raw"), TargetFormat::Raw, 1, Overwrite::Refuse).err().unwrap();
    assert!(matches!(error, TargetError::Exists { .. }), "{error}");
}

#[test]
fn a_disk_that_is_no_multiple_of_a_sector_keeps_its_tail() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for size in [0, 1, 511, 512, 513, 65_537, MIB + 100] {
        let disk: Vec<u8> = noise(size + 1, usize::try_from(size).unwrap()).iter().map(|byte| byte | 0x40).collect();
        fs::write(dir.path().join("a.raw"), &disk).unwrap();
        let path = dir.path().join("out.qcow2");
        let target = images::create_target(&path, TargetFormat::Qcow2, size, Overwrite::Replace).unwrap();
        for (number, piece) in disk.chunks(65_536).enumerate() {
            target.write_at(number as u64 * 65_536, piece).unwrap();
        }
        assert!(target.write_at(size, b"x").is_err(), "what is past the disk is not written");
        target.finish().unwrap();
        qemu_img(&dir, &["check", "-q", "out.qcow2"]);
        qemu_img(&dir, &["compare", "-f", "raw", "-F", "qcow2", "a.raw", "out.qcow2"]);
        let image = open(&path).unwrap();
        assert_eq!(image.size(), size.next_multiple_of(512));
        let read = contents(image.as_ref());
        let (content, rest) = read.split_at(disk.len());
        assert!(content == disk && rest.iter().all(|byte| *byte == 0), "{size} bytes read differently");
    }
    let error = images::create_target(&dir.path().join("b"), TargetFormat::Qcow2, u64::MAX, Overwrite::Refuse).err();
    assert!(matches!(error, Some(TargetError::Io { .. })), "{error:?}");
}

#[test]
fn an_unfinished_target_leaves_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.raw");
    fs::write(&path, "precious").unwrap();
    let target = images::create_target(&path, TargetFormat::Raw, MIB, Overwrite::Replace).unwrap();
    target.write_at(0, b"new").unwrap();
    drop(target);
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let target = images::create_target(&path, TargetFormat::Raw, MIB, Overwrite::Replace).unwrap();
    target.write_at(0, b"new").unwrap();
    target.finish().unwrap();
    assert_eq!(fs::read(&path).unwrap().len() as u64, MIB);
    let error = images::create_target(dir.path(), TargetFormat::Raw, MIB, Overwrite::Replace).err().unwrap();
    assert!(matches!(error, TargetError::Unfit { .. }), "{error}");
}

#[test]
fn what_was_cut_off_is_an_error_and_never_zeroes() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = noise(11, 2 * 1024 * 1024);
    fs::write(dir.path().join("a.raw"), &disk).unwrap();
    for options in [&["-S", "0"][..], &["-c"], &["-o", "cluster_size=512"]] {
        qemu_img(&dir, &[&["convert", "-O", "qcow2"], options, &["a.raw", "good.qcow2"]].concat());
        let good = fs::read(dir.path().join("good.qcow2")).unwrap();
        let path = dir.path().join("cut.qcow2");
        for eighth in 0..8 {
            let mut failures = 0;
            fs::write(&path, &good[..good.len() * eighth / 8]).unwrap();
            let options_of_ours = OpenOptions { format: Some(Format::Qcow2), ..OpenOptions::default() };
            let Ok(image) = images::open(&path, &options_of_ours) else { continue };
            for (number, expected) in disk.chunks(65_536).enumerate() {
                let mut buf = vec![0_u8; expected.len()];
                match image.read_at(number as u64 * 65_536, &mut buf) {
                    Ok(()) => assert!(buf == expected, "{options:?}, {eighth}/8: chunk {number} reads wrongly"),
                    Err(_) => failures += 1,
                }
            }
            assert!(failures > 0, "{options:?}, {eighth}/8: nothing is missing");
        }
    }
}

#[test]
fn what_was_cut_off_is_not_left_to_qemu() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    raw_disk(&dir, "a.raw", 4 * MIB, 15);
    let path = dir.path().join("cut.qcow2");
    for options in
        ["data_file=data.raw", "data_file=data.raw,data_file_raw=on", "compression_type=zstd", "extended_l2=on"]
    {
        qemu_img(&dir, &["convert", "-O", "qcow2", "-o", options, "a.raw", "cut.qcow2"]);
        assert!(matches!(open(&path).err(), Some(OpenError::Unsupported { .. })), "{options}: it is whole");
        let whole = fs::read(&path).unwrap();
        let level_1 = usize::try_from(u64::from_be_bytes(whole[40..48].try_into().unwrap())).unwrap();
        for length in [100, 512, 65_536, level_1, level_1 + 7] {
            fs::write(&path, &whole[..length]).unwrap();
            let error = open(&path).err();
            assert!(matches!(error, Some(OpenError::Damaged { .. })), "{options}, {length} bytes: {error:?}");
        }
    }
}

#[test]
fn a_raw_backing_file_is_raw_whatever_a_guest_wrote_to_it() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("secret"), "what only the host may read").unwrap();
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-b", "secret", "-F", "raw", "base.raw", "1M"]);
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "-u", "top.qcow2", "1M"]);
    assert_reads_as_qemu_reads(&dir, "top.qcow2");
    let image = open(&dir.path().join("top.qcow2")).unwrap();
    assert!(contents(image.as_ref()).starts_with(b"QFI\xfb"));
}

#[test]
fn holes_of_a_raw_backing_file_are_passed_over() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    raw_disk(&dir, "base.raw", 64 * MIB, 12);
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2", "80M"]);
    run("qemu-io", &["-c", "write -P 5 70M 4k", "-c", "write -z 0 64k", "top.qcow2"], dir.path());
    assert_reads_as_qemu_reads(&dir, "top.qcow2");
    let image = open(&dir.path().join("top.qcow2")).unwrap();
    let (mut at, mut data) = (0, 0);
    while let Some(range) = image.next_data(at).unwrap() {
        data += range.end - range.start;
        at = range.end;
    }
    assert!(data < MIB, "{data} bytes of data in a disk with 350 kB of it");
}

#[test]
fn threads_share_an_image_with_large_compressed_clusters() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = raw_disk(&dir, "a.raw", 20 * MIB + 512, 13);
    qemu_img(&dir, &["convert", "-c", "-O", "qcow2", "-o", "cluster_size=2M", "a.raw", "a.qcow2"]);
    let expected = fs::read(source).unwrap();
    let image = open(&dir.path().join("a.qcow2")).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4_usize {
            let (image, expected) = (&image, &expected);
            scope.spawn(move || {
                for round in 0..200_usize {
                    let at = (thread * 5_300_000 + round * 104_729) % (expected.len() - 70_000);
                    let mut buf = vec![0_u8; 70_000];
                    image.read_at(at as u64, &mut buf).unwrap();
                    assert!(buf == expected[at..at + 70_000], "thread {thread}, round {round}");
                }
            });
        }
    });
}

#[test]
fn an_image_that_was_not_closed_is_left_to_qemu() {
    if !qemu_img_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "a.qcow2", "1M"]);
    let path = dir.path().join("a.qcow2");
    File::options().write(true).open(&path).unwrap().write_all_at(&[1], 79).unwrap();
    assert!(matches!(open(&path).err(), Some(OpenError::Unsupported { format, .. }) if format == "qcow2"));
}

#[test]
fn a_target_takes_nothing_past_its_end_and_replaces_only_what_it_may() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.img");
    for format in [TargetFormat::Raw, TargetFormat::Qcow2] {
        let target = images::create_target(&path, format, MIB, Overwrite::Refuse).unwrap();
        target.write_at(MIB - 1, b"x").unwrap();
        for (offset, data) in [(MIB - 1, &b"xy"[..]), (MIB, b"x"), (u64::MAX, b"xy")] {
            assert!(target.write_at(offset, data).is_err(), "{offset}");
        }
        // Somebody else is faster.
        fs::write(&path, "first").unwrap();
        assert_eq!(target.finish().unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"first");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the unfinished image is still there");
        fs::remove_file(&path).unwrap();
    }
    let long = dir.path().join("x".repeat(255));
    images::create_raw(&long, MIB, Overwrite::Refuse).unwrap().finish().unwrap();
    assert_eq!(fs::metadata(&long).unwrap().len(), MIB);
}

#[test]
fn a_link_keeps_leading_to_what_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("pool")).unwrap();
    let disk = dir.path().join("pool/disk.raw");
    fs::write(&disk, "old").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o640);
    fs::set_permissions(&disk, mode).unwrap();
    let link = dir.path().join("link.raw");
    std::os::unix::fs::symlink(&disk, &link).unwrap();
    images::create_raw(&link, MIB, Overwrite::Replace).unwrap().finish().unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    let replaced = fs::metadata(&disk).unwrap();
    assert_eq!((replaced.len(), std::os::unix::fs::MetadataExt::mode(&replaced) & 0o777), (MIB, 0o640));
}

#[test]
fn block_devices_are_raw_disks_and_targets() {
    let dir = tempfile::tempdir().unwrap();
    let file = raw_disk(&dir, "backing.raw", 4 * MIB, 14);
    let Some(device) = LoopDevice::attach(&file) else {
        println!("skipped: no loop device can be had");
        return;
    };
    let path = Path::new(&device.0);
    let image = open(path).unwrap();
    assert_eq!((image.size(), image.describe()), (4 * MIB, "block device".to_owned()));
    assert!(contents(image.as_ref()) == fs::read(&file).unwrap());

    let create = |format, size, overwrite| images::create_target(path, format, size, overwrite);
    assert!(matches!(create(TargetFormat::Raw, MIB, Overwrite::Refuse).err(), Some(TargetError::Exists { .. })));
    assert!(matches!(create(TargetFormat::Qcow2, MIB, Overwrite::Replace).err(), Some(TargetError::Unfit { .. })));
    let error = create(TargetFormat::Raw, 4 * MIB + 1, Overwrite::Replace).err().unwrap();
    assert!(matches!(error, TargetError::TooSmall { available, .. } if available == 4 * MIB), "{error}");
    let target = create(TargetFormat::Raw, 4 * MIB, Overwrite::Replace).unwrap();
    assert!(!target.starts_zeroed());
    target.write_at(0, b"QFI\xfb\0\0\0\x03").unwrap();
    target.write_at(4 * MIB - 4, b"last").unwrap();
    let busy = create(TargetFormat::Raw, 4 * MIB, Overwrite::Replace).err();
    assert!(matches!(busy, Some(TargetError::Io { .. })), "a device is held by one target");
    target.finish().unwrap();
    // What a guest wrote does not make a device a qcow2 image.
    let image = open(path).unwrap();
    assert_eq!(image.size(), 4 * MIB);
    let mut end = [0_u8; 4];
    image.read_at(4 * MIB - 4, &mut end).unwrap();
    assert_eq!(&end, b"last");
}

/// A loop device, given back when dropped.
struct LoopDevice(String);

impl LoopDevice {
    fn attach(file: &Path) -> Option<LoopDevice> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        let name = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (output.status.success() && !name.is_empty()).then_some(LoopDevice(name))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        drop(Command::new("losetup").args(["--detach", &self.0]).status());
    }
}

#[test]
fn a_vmdk_descriptor_that_a_guest_wrote_reads_no_file_of_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let mut disk = b"# Disk DescriptorFile\nversion=1\nRW 1 FLAT \"/etc/passwd\" 0\n".to_vec();
    disk.resize(1 << 20, 0);
    fs::write(&path, &disk).unwrap();
    assert!(matches!(open(&path), Err(OpenError::Uncertain { format: "vmdk", .. })));
    let raw = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    assert_eq!(images::open(&path, &raw).unwrap().size(), 1 << 20);
}
