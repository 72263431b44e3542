//! Trees to fill file systems with, made with the systems' own tools, and what is read of them compared with the trees.

use std::fs;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use images::fs::{FileSystem, FileType, Node, Walk, WalkStep, find_path};
use images::volume::{Volume, scan};
use images::{Format, OpenOptions, SharedDisk};

/// What a file system can hold.
#[derive(Debug, Clone, Copy)]
pub struct Able {
    /// Modes and owners.
    pub unix: bool,
    /// Symbolic links.
    pub links: bool,
    /// Several names of a file.
    pub hard_links: bool,
    /// Pipes.
    pub special: bool,
    /// Holes in files.
    pub holes: bool,
    /// Extended attributes `user.`.
    pub xattrs: bool,
    /// Finest difference of modification times, in nanoseconds; 0 when they are not compared.
    pub time: i128,
}

/// All that a Unix file system holds; times in whole seconds, which is what the tools keep.
pub const UNIX: Able =
    Able { unix: true, links: true, hard_links: true, special: true, holes: true, xattrs: true, time: 1_000_000_000 };

/// Runs a tool; what it says is shown when it fails.
pub fn run(command: &mut Command) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output =
        command.env("PATH", path).output().unwrap_or_else(|error| panic!("{command:?}: {error}; see tests/deps.sh"));
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    text
}

/// Bytes that do not compress and differ by seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Makes a tree of everything that `able` allows.
pub fn make_tree(root: &Path, able: Able) {
    let write = |name: &str, bytes: &[u8]| fs::write(root.join(name), bytes).unwrap();
    for dir in ["etc", "deep/er/and/deeper still", "many", "empty dir"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    write("empty", b"");
    write("one", b"1");
    write("etc/hostname", b"web01\n");
    write("etc/\u{fc}ml\u{e4}ut \u{65e5}\u{672c}\u{8a9e}.txt", "gr\u{fc}\u{df}e".as_bytes());
    write("deep/er/and/deeper still/it is", &noise(1, 4095));
    write("block", &noise(2, 4096));
    write("blocks", &noise(3, 100_001));
    write("large", &noise(4, 5_000_003));
    write(&format!("etc/{}", "n".repeat(200)), b"a long name");
    for number in 0..700 {
        write(&format!("many/file number {number}"), format!("{number}\n").as_bytes());
    }
    if able.holes {
        let file = fs::File::create(root.join("sparse")).unwrap();
        file.set_len(40 << 20).unwrap();
        for (at, seed) in [(1 << 20, 5), (9 << 20, 6), ((40 << 20) - 10_000, 7)] {
            file.write_all_at(&noise(seed, 10_000), at).unwrap();
        }
        for at in 0..200 {
            file.write_all_at(&noise(at, 4096), (20 << 20) + at * 12_288).unwrap();
        }
        fs::File::create(root.join("all hole")).unwrap().set_len(10 << 20).unwrap();
    }
    if able.links {
        symlink("etc/hostname", root.join("link")).unwrap();
        symlink("x".repeat(59), root.join("link of 59")).unwrap();
        symlink("y".repeat(60), root.join("link of 60")).unwrap();
        symlink(format!("/{0}/{0}/{0}", "l".repeat(60)), root.join("long link")).unwrap();
        symlink("..", root.join("deep/up")).unwrap();
        symlink("/etc", root.join("absolute")).unwrap();
    }
    if able.hard_links {
        fs::hard_link(root.join("blocks"), root.join("etc/blocks again")).unwrap();
    }
    if able.special {
        run(Command::new("mkfifo").arg(root.join("pipe")));
    }
    if able.xattrs {
        for (name, length) in [("user.small", 10), ("user.larger", 200), ("user.largest", 500)] {
            let value: String = (0..length).map(|at| char::from(b'a' + u8::try_from(at % 26).unwrap())).collect();
            run(Command::new("setfattr").args(["-n", name, "-v", &value]).arg(root.join("block")));
        }
    }
    if able.unix {
        for (name, mode) in [("one", 0o4755), ("etc/hostname", 0o600), ("etc", 0o750), ("empty dir", 0o1777)] {
            fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
    }
    for (name, time) in [
        ("one", "2001-02-03 04:05:06 UTC"),
        ("etc/hostname", "2020-02-29 12:00:02 UTC"),
        ("many", "2024-12-31 23:59:58 UTC"),
    ] {
        run(Command::new("touch").args(["-d", time]).arg(root.join(name)));
    }
}

/// A tree of a hundred files.
pub fn make_small_tree(root: &Path) {
    for dir in ["etc/deep/er", "many"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::write(root.join("etc/hostname"), b"web01\n").unwrap();
    fs::write(root.join("etc/deep/er/noise"), noise(1, 200_000)).unwrap();
    for number in 0..100 {
        fs::write(
            root.join(format!("many/file number {number}")),
            noise(number, usize::try_from(number * 10).unwrap()),
        )
        .unwrap();
    }
    symlink("etc/hostname", root.join("link")).unwrap();
    symlink("l".repeat(100), root.join("long link")).unwrap();
}

/// Opens an image as a disk.
pub fn disk(image: &Path) -> SharedDisk {
    let options = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    Arc::from(images::open(image, &options).unwrap())
}

/// The volume of this name on a single disk.
pub fn volume(image: &Path, name: &str) -> Volume {
    let mut layouts = scan(&[("disk0".to_owned(), disk(image))]);
    let layout = layouts.pop().unwrap();
    let names: Vec<String> =
        layout.volumes.iter().map(|volume| format!("{} {}", volume.name, volume.content.name)).collect();
    let found = layout.volumes.into_iter().find(|volume| volume.name == name);
    found.unwrap_or_else(|| panic!("no {name} among {names:?}, {:?}", layout.notices))
}

/// Opens the file system of a volume.
pub fn open(volume: &Volume) -> Box<dyn FileSystem> {
    images::fs::open(volume.content.kind, volume.disk.clone())
        .unwrap_or_else(|error| panic!("{:?}: {error}", volume.content))
}

/// Everything that a file system holds, by path.
pub fn contents(fs: &dyn FileSystem) -> Vec<(PathBuf, Node)> {
    let root = fs.node(fs.root()).unwrap();
    let mut all: Vec<(PathBuf, Node)> = Walk::new(fs, root)
        .map(|step| match step {
            WalkStep::Node(path, node) => {
                (path.iter().map(|name| String::from_utf8(name.clone()).unwrap()).collect::<PathBuf>(), node)
            }
            WalkStep::Problem(path, error) => panic!("{path:?}: {error}"),
        })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn tree(root: &Path, at: &Path, found: &mut Vec<PathBuf>) {
    found.push(at.to_owned());
    if root.join(at).symlink_metadata().unwrap().is_dir() {
        for entry in fs::read_dir(root.join(at)).unwrap() {
            tree(root, &at.join(entry.unwrap().file_name()), found);
        }
    }
}

/// Compares all of a file system with the tree that it was made from. `own` are names that its maker adds at the root.
pub fn assert_same(fs: &dyn FileSystem, root: &Path, able: Able, own: &[&str]) {
    let found = contents(fs);
    let is_own = |path: &Path| path.iter().next().is_some_and(|first| own.iter().any(|own| first == *own));
    let names: Vec<PathBuf> = found.iter().map(|(path, _)| path.clone()).filter(|path| !is_own(path)).collect();
    let mut wanted = Vec::new();
    tree(root, Path::new(""), &mut wanted);
    wanted.sort();
    assert_eq!(names, wanted);
    for (index, (path, node)) in found.iter().filter(|(path, _)| !is_own(path)).enumerate() {
        assert_same_node(fs, path, node, &root.join(path), able);
        // To find one among thousands takes its time.
        if index % 20 == 0 || path.iter().count() == 1 {
            let (_, by_path) = find_path(fs, path.to_str().unwrap().as_bytes()).unwrap();
            assert_eq!(by_path.id, node.id, "{path:?}");
        }
    }
}

fn assert_same_node(fs: &dyn FileSystem, path: &Path, node: &Node, wanted: &Path, able: Able) {
    let meta = wanted.symlink_metadata().unwrap();
    let kind = match meta.file_type() {
        kind if kind.is_dir() => FileType::Directory,
        kind if kind.is_symlink() => FileType::Symlink,
        kind if kind.is_fifo() => FileType::Fifo,
        _ => FileType::File,
    };
    assert_eq!(node.kind, kind, "{path:?}");
    if able.unix && path != Path::new("") {
        assert_eq!((node.mode, node.uid, node.gid), (meta.mode() & 0o7777, meta.uid(), meta.gid()), "{path:?}");
    }
    if able.hard_links && kind == FileType::File {
        assert_eq!(u64::from(node.links), meta.nlink(), "{path:?}");
    }
    if able.time > 0 && path != Path::new("") && kind != FileType::Symlink {
        let ours = i128::from(node.modified.seconds) * 1_000_000_000 + i128::from(node.modified.nanoseconds);
        let theirs = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
        assert!((ours - theirs).abs() < able.time, "{path:?}: {ours} instead of {theirs}");
    }
    match kind {
        FileType::Symlink => {
            let target = fs.read_link(node.id).unwrap();
            assert_eq!(target, fs::read_link(wanted).unwrap().as_os_str().as_encoded_bytes(), "{path:?}");
        }
        FileType::File => assert_same_file(fs, node, wanted, able),
        _ => {}
    }
    if able.xattrs && kind == FileType::File && !(path.starts_with("many") || path.starts_with("crowd")) {
        let mut ours: Vec<String> = fs
            .xattrs(node.id)
            .unwrap()
            .into_iter()
            .filter(|(name, _)| name.starts_with(b"user."))
            .map(|(name, value)| {
                format!("{}=\"{}\"", String::from_utf8(name).unwrap(), String::from_utf8(value).unwrap())
            })
            .collect();
        ours.sort();
        let dump = run(Command::new("getfattr").args(["-d", "--absolute-names"]).arg(wanted));
        let mut theirs: Vec<String> =
            dump.lines().filter(|line| line.starts_with("user.")).map(str::to_owned).collect();
        theirs.sort();
        assert_eq!(ours, theirs, "{path:?}");
    }
}

fn assert_same_file(fs: &dyn FileSystem, node: &Node, wanted: &Path, able: Able) {
    let content = fs.open(node.id).unwrap_or_else(|error| panic!("{wanted:?}: {error}"));
    let bytes = fs::read(wanted).unwrap();
    assert_eq!(content.size(), bytes.len() as u64, "{wanted:?}");
    assert_eq!(node.size, content.size(), "{wanted:?}");
    let mut whole = vec![0xee; bytes.len()];
    content.read_at(0, &mut whole).unwrap_or_else(|error| panic!("{wanted:?}: {error}"));
    assert!(whole == bytes, "{wanted:?} differs");
    // Odd pieces, too.
    for at in (0..bytes.len()).step_by(40_009) {
        let mut piece = vec![0xee; 777.min(bytes.len() - at)];
        content.read_at(at as u64, &mut piece).unwrap();
        assert!(piece == bytes[at..at + piece.len()], "{wanted:?} differs at {at}");
    }
    assert!(content.read_at(bytes.len() as u64, &mut [0]).is_err(), "{wanted:?} goes on behind its end");
    // What is not told to be data reads as zeroes, and large holes are told.
    let (mut at, mut data) = (0, 0);
    while let Some(range) = content.next_data(at).unwrap() {
        assert!(range.start >= at && range.end > range.start && range.end <= content.size(), "{wanted:?}: {range:?}");
        let gap = &bytes[usize::try_from(at).unwrap()..usize::try_from(range.start).unwrap()];
        assert!(gap.iter().all(|byte| *byte == 0), "{wanted:?}: a hole at {at} has data");
        data += range.end - range.start;
        at = range.end;
    }
    assert!(bytes[usize::try_from(at).unwrap()..].iter().all(|byte| *byte == 0), "{wanted:?}: a hole at its end");
    if able.holes {
        let allocated = wanted.metadata().unwrap().blocks() * 512;
        assert!(data <= allocated + (256 << 10), "{wanted:?}: {data} bytes of data, {allocated} in the original");
    }
}

/// Whether this is root, who alone can mount with the kernel's drivers.
pub fn is_root() -> bool {
    run(Command::new("id").arg("-u")).trim() == "0"
}

/// Whether the kernel's driver of this file system can be used to fill an image. If not, a test that needs it is passed
/// over, which CI does not take.
pub fn kernel_has(name: &str) -> bool {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has = is_root() && known.lines().any(|line| line.trim_start_matches("nodev").trim() == name);
    assert!(
        has || std::env::var_os("CI").is_none_or(|ci| ci.is_empty()),
        "the kernel has no {name}, or this is not root"
    );
    if !has {
        eprintln!("passed over: the kernel has no {name}, or this is not root");
    }
    has
}

/// A file system that is mounted until this is dropped.
pub struct Mounted(pub PathBuf);

impl Mounted {
    pub fn new(dir: &Path, driver: &mut Command) -> Mounted {
        fs::create_dir_all(dir).unwrap();
        let outside = fs::metadata(dir).unwrap();
        run(driver);
        for _ in 0..500 {
            if fs::metadata(dir).is_ok_and(|inside| inside.dev() != outside.dev()) {
                return Mounted(dir.to_owned());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{driver:?} did not mount");
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The driver writes out what it has when it is unmounted; umount waits for it, fusermount3 does not.
        run(Command::new("sync").arg("-f").arg(&self.0));
        run(Command::new("umount").arg(&self.0));
    }
}

/// A loop device until this is dropped.
pub struct Loop(pub String);

impl Loop {
    pub fn new(image: &Path) -> Loop {
        Loop(run(Command::new("losetup").args(["--find", "--show"]).arg(image)).trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run(Command::new("losetup").args(["--detach", &self.0]));
    }
}

/// Waits until a driver in user space has written everything and ended.
pub fn wait_for_end(driver: &str, image: &Path) {
    for _ in 0..500 {
        let busy = Command::new("pgrep").arg("-f").arg(format!("{driver}.*{}", image.display())).output().unwrap();
        if busy.stdout.is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{driver} still has {}", image.display());
}

/// The names in the root directory of a volume.
pub fn find_names(volume: &Volume) -> Vec<String> {
    let fs = open(volume);
    let entries = fs.read_dir(fs.root(), 0).unwrap();
    entries.into_iter().map(|entry| String::from_utf8(entry.name).unwrap()).collect()
}
