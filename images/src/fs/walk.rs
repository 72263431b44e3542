//! Paths and trees: resolving a path, and walking all that lies below a directory.

use std::collections::HashSet;

use super::{FileSystem, FileType, FsError, Node, NodeId};

/// Symbolic links followed for one path; Linux follows as many.
const LINKS_MAX: usize = 40;
/// Deepest directory that is walked; a path of Linux is shorter.
const DEPTH_MAX: usize = 2048;

/// An object with its path: the names from the root on.
pub type Located = (Vec<Vec<u8>>, Node);

/// The object at `path`, which begins at the root whether or not it begins with `/`. Symbolic links on the way are
/// followed within the file system; the last component is not. Returns the path without links, too.
pub fn find_path(fs: &dyn FileSystem, path: &[u8]) -> Result<Located, FsError> {
    let shown = || String::from_utf8_lossy(path).into_owned();
    let split = |path: &[u8]| path.split(|byte| *byte == b'/').map(<[u8]>::to_vec).rev().collect::<Vec<_>>();
    let mut todo = split(path);
    let mut done: Vec<(Vec<u8>, NodeId)> = Vec::new();
    let mut node = fs.node(fs.root())?;
    let mut links = 0;
    while let Some(name) = todo.pop() {
        match name.as_slice() {
            b"" | b"." => continue,
            b".." => {
                done.pop();
                node = fs.node(done.last().map_or(fs.root(), |(_, id)| *id))?;
                continue;
            }
            _ => {}
        }
        if node.kind != FileType::Directory {
            return Err(FsError::NotADirectory { path: join(done.iter().map(|(name, _)| name.as_slice())) });
        }
        let id = fs.lookup(node.id, &name)?.ok_or_else(|| FsError::NotFound {
            path: join(done.iter().map(|(name, _)| name.as_slice()).chain([name.as_slice()])),
        })?;
        let next = fs.node(id)?;
        let last = todo.iter().all(|name| name.is_empty());
        // A slash at the end asks for what the link points to.
        if next.kind == FileType::Symlink && !(last && todo.is_empty()) {
            links += 1;
            if links > LINKS_MAX {
                return Err(FsError::Loop { path: shown() });
            }
            let target = fs.read_link(id)?;
            if target.starts_with(b"/") {
                done.clear();
                node = fs.node(fs.root())?;
            }
            todo.extend(split(&target));
            if todo.len() > DEPTH_MAX {
                return Err(FsError::Loop { path: shown() });
            }
            continue;
        }
        done.push((name, id));
        node = next;
    }
    Ok((done.into_iter().map(|(name, _)| name).collect(), node))
}

fn join<'a>(names: impl Iterator<Item = &'a [u8]>) -> String {
    names.map(|name| format!("/{}", String::from_utf8_lossy(name))).collect()
}

/// One step of a walk.
#[derive(Debug)]
pub enum WalkStep {
    /// An object; a directory comes before what it holds. The path has the names from the walk's beginning on.
    Node(Vec<Vec<u8>>, Node),
    /// An object, or the rest of a directory, that cannot be read. The walk goes on with what comes next.
    Problem(Vec<Vec<u8>>, FsError),
}

/// Walks all that lies below a directory. A directory is entered once only, whatever a hostile disk says.
pub struct Walk<'a> {
    fs: &'a dyn FileSystem,
    /// Open directories: name, id, entries that wait (last first), cursor, end.
    stack: Vec<Level>,
    seen: HashSet<NodeId>,
    first: Option<Node>,
}

struct Level {
    name: Vec<u8>,
    id: NodeId,
    waiting: Vec<super::DirEntry>,
    cursor: u64,
    ended: bool,
}

impl<'a> Walk<'a> {
    /// Begins at `node`, which is the first step with an empty path.
    pub fn new(fs: &'a dyn FileSystem, node: Node) -> Walk<'a> {
        Walk { fs, stack: Vec::new(), seen: HashSet::new(), first: Some(node) }
    }

    fn path(&self, name: &[u8]) -> Vec<Vec<u8>> {
        let mut path: Vec<Vec<u8>> = self.stack.iter().skip(1).map(|level| level.name.clone()).collect();
        path.push(name.to_vec());
        path
    }

    fn own_path(&self) -> Vec<Vec<u8>> {
        self.stack.iter().skip(1).map(|level| level.name.clone()).collect()
    }

    fn enter(&mut self, name: Vec<u8>, id: NodeId) {
        self.seen.insert(id);
        self.stack.push(Level { name, id, waiting: Vec::new(), cursor: 0, ended: false });
    }
}

impl Iterator for Walk<'_> {
    type Item = WalkStep;

    fn next(&mut self) -> Option<WalkStep> {
        if let Some(node) = self.first.take() {
            if node.kind == FileType::Directory {
                self.enter(Vec::new(), node.id);
            }
            return Some(WalkStep::Node(Vec::new(), node));
        }
        loop {
            let level = self.stack.last_mut()?;
            let Some(entry) = level.waiting.pop() else {
                if level.ended {
                    self.stack.pop();
                    continue;
                }
                match self.fs.read_dir(level.id, level.cursor) {
                    Ok(entries) => {
                        match entries.last() {
                            // A cursor that does not move would read the same entries for ever.
                            Some(last) if last.next > level.cursor => level.cursor = last.next,
                            _ => level.ended = true,
                        }
                        level.waiting = entries;
                        level.waiting.reverse();
                        continue;
                    }
                    Err(error) => {
                        level.ended = true;
                        return Some(WalkStep::Problem(self.own_path(), error));
                    }
                }
            };
            let path = self.path(&entry.name);
            let node = match self.fs.node(entry.id) {
                Ok(node) => node,
                Err(error) => return Some(WalkStep::Problem(path, error)),
            };
            if node.kind == FileType::Directory {
                let again = self.seen.contains(&node.id) || self.stack.len() >= DEPTH_MAX;
                if again {
                    let shown = join(path.iter().map(Vec::as_slice));
                    return Some(WalkStep::Problem(path, FsError::Loop { path: shown }));
                }
                self.enter(entry.name, node.id);
            }
            return Some(WalkStep::Node(path, node));
        }
    }
}
