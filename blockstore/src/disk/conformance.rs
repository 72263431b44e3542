//! What every [`Folder`] and its disks must do, whatever they stand on.

use std::io::ErrorKind;
use std::path::Path;

use super::{Folder, ReadAt};

/// Runs the whole suite in an empty folder.
pub(crate) fn check(folder: &dyn Folder) {
    disks(folder);
    names(folder);
    locks(folder);
    paths(folder);
}

fn read(folder: &dyn Folder, path: &str) -> Vec<u8> {
    let disk = folder.open_read(Path::new(path)).unwrap();
    let mut bytes = vec![0; usize::try_from(disk.len().unwrap()).unwrap()];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

fn disks(folder: &dyn Folder) {
    folder.create_dir(Path::new("")).unwrap();
    let disk = folder.create(Path::new("disk")).unwrap();
    assert!(disk.is_empty().unwrap());
    disk.set_len(1 << 20).unwrap();
    disk.write_at(700_000, &[0; 100]).unwrap();
    disk.write_at(900_000, &[1]).unwrap();
    disk.set_len(0).unwrap();
    disk.write_at(5000, b"world").unwrap();
    disk.write_at(0, b"hello").unwrap();
    disk.write_at(0, b"").unwrap();
    assert_eq!(disk.len().unwrap(), 5005);
    disk.sync().unwrap();
    let mut buf = [1; 5];
    disk.read_at(2500, &mut buf).unwrap();
    assert_eq!(buf, [0; 5], "a gap reads as zeroes");
    disk.read_at(5000, &mut buf).unwrap();
    assert_eq!(&buf, b"world");
    assert_eq!(disk.read_at(5001, &mut buf).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    assert_eq!(disk.read_at(1 << 40, &mut buf).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    disk.read_at(5005, &mut []).unwrap();
    let wanted = |offset, length| ReadAt { offset, buffer: vec![1; length] };
    let mut many = [wanted(5000, 5), wanted(0, 5), wanted(3000, 1000), wanted(5005, 0)];
    disk.read_many(&mut many).unwrap();
    assert_eq!((&*many[0].buffer, &*many[1].buffer, &*many[3].buffer), (&b"world"[..], &b"hello"[..], &b""[..]));
    assert_eq!(many[2].buffer, [0; 1000]);
    disk.read_many(&mut []).unwrap();
    let past = disk.read_many(&mut [wanted(0, 5), wanted(5001, 5)]).unwrap_err();
    assert_eq!(past.kind(), ErrorKind::UnexpectedEof);

    // A cut forgets what it cuts off, an extension is a hole.
    disk.set_len(5002).unwrap();
    disk.set_len(1 << 33).unwrap();
    disk.read_at(5000, &mut buf).unwrap();
    assert_eq!(&buf, b"wo\0\0\0");
    assert_eq!(disk.len().unwrap(), 1 << 33);

    // A punch zeroes exactly what it names and keeps the length, also across the end.
    disk.write_at(8000, &[7; 20_000]).unwrap();
    disk.punch(9000, 10_000).unwrap();
    disk.punch(8500, 0).unwrap();
    let mut after = vec![1; 20_000];
    disk.read_at(8000, &mut after).unwrap();
    assert!(after[..1000].iter().all(|byte| *byte == 7));
    assert!(after[1000..11_000].iter().all(|byte| *byte == 0));
    assert!(after[11_000..].iter().all(|byte| *byte == 7));
    disk.set_len(20_000).unwrap();
    disk.punch(19_000, 5000).unwrap();
    disk.punch(30_000, 5000).unwrap();
    assert_eq!(disk.len().unwrap(), 20_000);
    disk.sync().unwrap();

    let reader = folder.open_read(Path::new("disk")).unwrap();
    assert!(reader.write_at(0, b"no").is_err(), "opened for reading");
    reader.read_at(0, &mut buf).unwrap();
    assert_eq!(&buf, b"hello");
    disk.write_at(0, b"HELLO").unwrap();
    reader.read_at(0, &mut buf).unwrap();
    assert_eq!(&buf, b"HELLO", "one file, however often opened");
    folder.remove(Path::new("disk")).unwrap();
    reader.read_at(0, &mut buf).unwrap();
    disk.write_at(0, b"alive").unwrap();
    assert_eq!(folder.open_read(Path::new("disk")).unwrap_err().kind(), ErrorKind::NotFound);
}

fn names(folder: &dyn Folder) {
    let missing = ErrorKind::NotFound;
    assert!(folder.list(Path::new("a/b")).unwrap().is_empty());
    assert!(folder.list_dirs(Path::new("a")).unwrap().is_empty());
    assert_eq!(folder.create(Path::new("a/b/one")).unwrap_err().kind(), missing, "no such directory");
    folder.create_dir(Path::new("a/b")).unwrap();
    folder.create_dir(Path::new("a/b")).unwrap();
    folder.create(Path::new("a/b/one")).unwrap().write_at(0, b"one").unwrap();
    assert_eq!(folder.create(Path::new("a/b/one")).unwrap_err().kind(), ErrorKind::AlreadyExists);
    folder.create(Path::new("a/two")).unwrap().write_at(0, b"two").unwrap();
    folder.sync_dir(Path::new("a/b")).unwrap();
    folder.sync_dir(Path::new("a")).unwrap();
    assert_eq!(folder.sync_dir(Path::new("nowhere")).unwrap_err().kind(), missing);

    let listed = folder.list(Path::new("a")).unwrap();
    assert_eq!(listed.len(), 1, "directories and what is below them are not files here");
    assert_eq!((listed[0].path.as_path(), listed[0].len), (Path::new("a/two"), 3));
    assert_eq!(folder.list_dirs(Path::new("a")).unwrap(), [Path::new("a/b")]);
    assert_eq!(folder.list_dirs(Path::new("")).unwrap(), [Path::new("a")]);
    assert!(folder.create(Path::new("a/b")).is_err(), "a directory stands there");
    assert!(folder.open_read(Path::new("a/b")).is_err());

    folder.rename(Path::new("a/two"), Path::new("a/b/one")).unwrap();
    assert_eq!(read(folder, "a/b/one"), b"two", "a rename replaces");
    assert!(folder.list(Path::new("a")).unwrap().is_empty());
    folder.rename(Path::new("a/b/one"), Path::new("a/b/one")).unwrap();
    assert_eq!(read(folder, "a/b/one"), b"two");
    assert_eq!(folder.rename(Path::new("a/two"), Path::new("a/x")).unwrap_err().kind(), missing);
    assert_eq!(folder.remove(Path::new("a/two")).unwrap_err().kind(), missing);
    folder.remove(Path::new("a/b/one")).unwrap();
    assert!(folder.list(Path::new("a/b")).unwrap().is_empty());
}

fn locks(folder: &dyn Folder) {
    let path = Path::new("locked");
    assert_eq!(folder.open_exclusive(path).unwrap_err().kind(), ErrorKind::NotFound);
    folder.create(path).unwrap().write_at(0, b"x").unwrap();
    let first = folder.open_exclusive(path).unwrap();
    assert_eq!(folder.open_exclusive(path).unwrap_err().kind(), ErrorKind::ResourceBusy);
    folder.open_read(path).unwrap().read_at(0, &mut [0]).unwrap();
    first.write_at(0, b"y").unwrap();
    folder.rename(path, Path::new("moved")).unwrap();
    assert_eq!(
        folder.open_exclusive(Path::new("moved")).unwrap_err().kind(),
        ErrorKind::ResourceBusy,
        "the file is locked, not its name"
    );
    drop(first);
    folder.open_exclusive(Path::new("moved")).unwrap();
    folder.remove(Path::new("moved")).unwrap();
}

fn paths(folder: &dyn Folder) {
    for bad in ["../x", "/etc/passwd", "a/../../x", ".."] {
        let path = Path::new(bad);
        let refused = |kind: ErrorKind| assert_eq!(kind, ErrorKind::InvalidInput, "{bad}");
        refused(folder.create(path).unwrap_err().kind());
        refused(folder.open_exclusive(path).unwrap_err().kind());
        refused(folder.open_read(path).unwrap_err().kind());
        refused(folder.rename(path, Path::new("y")).unwrap_err().kind());
        refused(folder.rename(Path::new("y"), path).unwrap_err().kind());
        refused(folder.remove(path).unwrap_err().kind());
        refused(folder.list(path).unwrap_err().kind());
        refused(folder.list_dirs(path).unwrap_err().kind());
        refused(folder.create_dir(path).unwrap_err().kind());
        refused(folder.sync_dir(path).unwrap_err().kind());
    }
}
