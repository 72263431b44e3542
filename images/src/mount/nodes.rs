//! The numbers by which the kernel knows what is mounted. Folders of the mount itself have fixed ones; a node of a file
//! system has one for as long as the kernel holds on to it.

use std::collections::HashMap;

use crate::fs::NodeId;

/// What a number stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// The mounted folder.
    Root,
    /// The folder of a disk.
    Disk(usize),
    /// The file of a disk.
    Raw(usize),
    /// A node of a volume; the root of its file system when none is given.
    Node(usize, Option<NodeId>),
}

/// The numbers.
#[derive(Debug)]
pub(super) struct Nodes {
    disks: usize,
    volumes: usize,
    by_number: HashMap<u64, (usize, NodeId, u64)>,
    by_node: HashMap<(usize, NodeId), u64>,
    next: u64,
}

/// The mounted folder's number is FUSE's choice.
const ROOT: u64 = 1;

impl Nodes {
    pub(super) fn new(disks: usize, volumes: usize) -> Nodes {
        let next = ROOT + 1 + 2 * disks as u64 + volumes as u64;
        Nodes { disks, volumes, by_number: HashMap::new(), by_node: HashMap::new(), next }
    }

    pub(super) fn disk(&self, at: usize) -> u64 {
        ROOT + 1 + at as u64
    }

    pub(super) fn raw(&self, at: usize) -> u64 {
        ROOT + 1 + (self.disks + at) as u64
    }

    pub(super) fn root_of(&self, volume: usize) -> u64 {
        ROOT + 1 + (2 * self.disks + volume) as u64
    }

    pub(super) fn what(&self, number: u64) -> Option<What> {
        if let Some((volume, id, _)) = self.by_number.get(&number) {
            return Some(What::Node(*volume, Some(*id)));
        }
        let at = usize::try_from(number.checked_sub(ROOT)?).ok()?;
        let Some(at) = at.checked_sub(1) else { return Some(What::Root) };
        match at {
            _ if at < self.disks => Some(What::Disk(at)),
            _ if at < 2 * self.disks => Some(What::Raw(at - self.disks)),
            _ if at < 2 * self.disks + self.volumes => Some(What::Node(at - 2 * self.disks, None)),
            _ => None,
        }
    }

    /// The number of a node, which the kernel knows once more from now on.
    pub(super) fn known(&mut self, volume: usize, id: NodeId) -> u64 {
        if let Some(number) = self.by_node.get(&(volume, id)).copied() {
            if let Some((_, _, count)) = self.by_number.get_mut(&number) {
                *count += 1;
            }
            return number;
        }
        let number = self.next;
        self.next += 1;
        self.by_node.insert((volume, id), number);
        self.by_number.insert(number, (volume, id, 1));
        number
    }

    /// The kernel knows it so many times less.
    pub(super) fn forget(&mut self, number: u64, count: u64) {
        let Some((volume, id, known)) = self.by_number.get_mut(&number) else { return };
        *known = known.saturating_sub(count);
        if *known == 0 {
            self.by_node.remove(&(*volume, *id));
            self.by_number.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_last_as_long_as_they_are_known() {
        let mut nodes = Nodes::new(2, 3);
        let all = [nodes.disk(1), nodes.raw(0), nodes.root_of(2)].map(|number| nodes.what(number));
        assert_eq!(all, [Some(What::Disk(1)), Some(What::Raw(0)), Some(What::Node(2, None))]);
        let number = nodes.known(1, NodeId(7));
        assert_eq!(nodes.known(1, NodeId(7)), number);
        assert_ne!(nodes.known(2, NodeId(7)), number);
        nodes.forget(number, 1);
        assert_eq!(nodes.what(number), Some(What::Node(1, Some(NodeId(7)))));
        nodes.forget(number, 1);
        assert_eq!(nodes.what(number), None);
        assert_ne!(nodes.known(1, NodeId(7)), number, "a number is not used again");
    }
}
