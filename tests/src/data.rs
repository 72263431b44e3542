//! Disk files, copied and compared without holding one in memory.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::tool;

const BLOCK: usize = 1 << 16;

/// Copies a file and keeps its holes.
#[track_caller]
pub fn copy_sparse(from: &Path, to: &Path) {
    let (from, to) = (from.display().to_string(), to.display().to_string());
    tool("cp", &["--sparse=always", "--", &from, &to]);
}

/// Compares two files, and names the place of the first difference.
#[track_caller]
pub fn assert_same_bytes(left: &Path, right: &Path) {
    let (mut a, mut b) = (open(left, File::open), open(right, File::open));
    let (mut block_a, mut block_b) = (Vec::with_capacity(BLOCK), Vec::with_capacity(BLOCK));
    let mut at = 0;
    loop {
        read_block(&mut a, &mut block_a, left);
        read_block(&mut b, &mut block_b, right);
        if let Some(place) = block_a.iter().zip(&block_b).position(|(x, y)| x != y) {
            panic!("{} and {} differ at byte {}", left.display(), right.display(), at + place as u64);
        }
        let (len_a, len_b) = (at + block_a.len() as u64, at + block_b.len() as u64);
        assert!(len_a == len_b, "{} and {} are the same up to the end of the shorter", left.display(), right.display());
        if block_a.is_empty() {
            return;
        }
        at = len_a;
    }
}

fn open<'a>(path: &'a Path, how: impl FnOnce(&'a Path) -> std::io::Result<File>) -> File {
    how(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn read_block(file: &mut File, block: &mut Vec<u8>, path: &Path) {
    block.clear();
    let read = file.take(BLOCK as u64).read_to_end(block);
    read.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_copy_is_the_same() {
        let dir = tempfile::tempdir().expect("a folder can be made");
        let path = |name: &str| dir.path().join(name);
        fs::write(path("a"), crate::noise(7, 200_001)).expect("the file can be written");
        copy_sparse(&path("a"), &path("b"));
        assert_same_bytes(&path("a"), &path("b"));
        assert_eq!(fs::read(path("a")).ok(), fs::read(path("b")).ok());
    }

    #[test]
    #[should_panic(expected = "differ at byte 70000")]
    fn the_first_difference_is_named() {
        let dir = tempfile::tempdir().expect("a folder can be made");
        let mut bytes = vec![1; 100_000];
        fs::write(dir.path().join("a"), &bytes).expect("the file can be written");
        bytes[70_000] = 2;
        fs::write(dir.path().join("b"), &bytes).expect("the file can be written");
        assert_same_bytes(&dir.path().join("a"), &dir.path().join("b"));
    }

    #[test]
    #[should_panic(expected = "the shorter")]
    fn a_longer_file_is_another_file() {
        let dir = tempfile::tempdir().expect("a folder can be made");
        fs::write(dir.path().join("a"), vec![1; BLOCK]).expect("the file can be written");
        fs::write(dir.path().join("b"), vec![1; BLOCK + 1]).expect("the file can be written");
        assert_same_bytes(&dir.path().join("a"), &dir.path().join("b"));
    }
}
