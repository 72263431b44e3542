//! The tree of chunk ids that makes a disk: its shape, its nodes and how it is built. Specification:
//! docs/format/manifest.md

use bytes::Bytes;

use crate::id::ChunkId;

/// Ids in a node.
pub(crate) const FAN_OUT: u64 = 512;
/// Bytes of a node.
pub(crate) const NODE_LEN: u32 = 16_384;
/// Deepest tree.
const MAX_LEVELS: u8 = 7;
/// Largest disk.
pub(crate) const MAX_DISK_SIZE: u64 = 1 << 62;
const ID_LEN: usize = 32;

/// The shape of a disk's tree, which follows from its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Number of chunks.
    pub chunks: u64,
    /// Number of levels; the root's level is one less.
    pub levels: u8,
}

impl Shape {
    /// The tree of a disk of `size` bytes. Sizes beyond [`MAX_DISK_SIZE`] get none.
    pub fn of(size: u64, chunk_size: u32) -> Option<Shape> {
        if size > MAX_DISK_SIZE {
            return None;
        }
        let chunks = size.div_ceil(u64::from(chunk_size)).max(1);
        let levels = (1..=MAX_LEVELS).find(|levels| FAN_OUT.pow(u32::from(*levels)) >= chunks)?;
        Some(Shape { chunks, levels })
    }

    /// Chunks below one node of a level.
    pub fn span(level: u8) -> u64 {
        FAN_OUT.saturating_pow(u32::from(level) + 1)
    }
}

/// A node, or the fact that everything below is zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node(Option<Bytes>);

impl Node {
    /// The node of an all-zero subtree.
    pub const ZERO: Node = Node(None);

    /// The node in decoded bytes; none if their length is wrong.
    pub fn new(bytes: Bytes) -> Option<Node> {
        (bytes.len() == NODE_LEN as usize).then_some(Node(Some(bytes)))
    }

    /// One of its 512 children.
    pub fn child(&self, at: u64) -> ChunkId {
        let at = usize::try_from(at % FAN_OUT).unwrap_or(0);
        let bytes = self.0.as_deref().and_then(|bytes| bytes.get(at * ID_LEN..));
        ChunkId(bytes.and_then(|bytes| bytes.first_chunk().copied()).unwrap_or([0; ID_LEN]))
    }

    /// Whether everything below is zero.
    pub fn is_zero(&self) -> bool {
        self.0.is_none()
    }

    /// Bytes held.
    pub fn weight(&self) -> u64 {
        self.0.as_ref().map_or(0, |bytes| bytes.len() as u64)
    }
}

/// Takes the ids of a disk's chunks in order and gives out its nodes, bottom up.
#[derive(Debug)]
pub(crate) struct TreeBuilder {
    levels: Vec<Level>,
}

#[derive(Debug, Default)]
struct Level {
    ids: Vec<u8>,
    /// Whether any id is not zero.
    data: bool,
}

impl Level {
    fn push(&mut self, id: &ChunkId) {
        self.ids.extend_from_slice(&id.0);
        self.data |= !id.is_zero();
    }

    fn is_full(&self) -> bool {
        self.ids.len() == NODE_LEN as usize
    }

    fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

impl TreeBuilder {
    /// A builder for a tree of a shape.
    pub fn new(shape: Shape) -> TreeBuilder {
        TreeBuilder { levels: (0..shape.levels).map(|_| Level::default()).collect() }
    }

    /// Adds the next chunk. `store` is given each complete node that is not all zero and returns its id.
    pub fn push<E>(&mut self, id: &ChunkId, store: &mut impl FnMut(u8, &[u8]) -> Result<ChunkId, E>) -> Result<(), E> {
        self.push_to(0, id, store)
    }

    /// Adds a run of all-zero chunks; costs as little as it can.
    pub fn push_zeroes<E>(
        &mut self,
        mut count: u64,
        store: &mut impl FnMut(u8, &[u8]) -> Result<ChunkId, E>,
    ) -> Result<(), E> {
        while count > 0 {
            // The highest level whose lower levels stand at a border and whose child fits.
            let mut at = 0;
            let mut size = 1;
            while at + 1 < self.levels.len()
                && self.levels.get(at).is_some_and(Level::is_empty)
                && size * FAN_OUT <= count
            {
                at += 1;
                size *= FAN_OUT;
            }
            self.push_to(at, &ChunkId::ZERO, store)?;
            count -= size;
        }
        Ok(())
    }

    /// Adds a subtree that is stored: the next chunk on level 0, the next leaf on level 1, and so on. The levels below
    /// must stand at a border.
    pub fn push_at<E>(
        &mut self,
        at: u8,
        id: &ChunkId,
        store: &mut impl FnMut(u8, &[u8]) -> Result<ChunkId, E>,
    ) -> Result<(), E> {
        self.push_to(at.into(), id, store)
    }

    fn push_to<E>(
        &mut self,
        at: usize,
        id: &ChunkId,
        store: &mut impl FnMut(u8, &[u8]) -> Result<ChunkId, E>,
    ) -> Result<(), E> {
        let last = at + 1 == self.levels.len();
        let Some(level) = self.levels.get_mut(at) else { return Ok(()) }; // beyond the root: more chunks than the shape
        level.push(id);
        if level.is_full() && !last {
            let id = self.close(at, store)?;
            self.push_to(at + 1, &id, store)?;
        }
        Ok(())
    }

    fn close<E>(&mut self, at: usize, store: &mut impl FnMut(u8, &[u8]) -> Result<ChunkId, E>) -> Result<ChunkId, E> {
        let Some(level) = self.levels.get_mut(at) else { return Ok(ChunkId::ZERO) };
        let mut node = std::mem::take(level);
        if !node.data {
            return Ok(ChunkId::ZERO);
        }
        node.ids.resize(NODE_LEN as usize, 0);
        let id = store(u8::try_from(at).unwrap_or(u8::MAX), &node.ids)?; // at most 6
        node.ids.clear();
        node.data = false;
        *level = node; // keeps the buffer
        Ok(id)
    }

    /// Completes the tree and returns the root's id.
    pub fn finish<E>(mut self, store: &mut impl FnMut(u8, &[u8]) -> Result<ChunkId, E>) -> Result<ChunkId, E> {
        let mut id = ChunkId::ZERO;
        for at in 0..self.levels.len() {
            if self.levels.get(at).is_some_and(Level::is_empty) && at + 1 < self.levels.len() {
                continue;
            }
            id = self.close(at, store)?;
            if at + 1 < self.levels.len() {
                self.push_to(at + 1, &id, store)?;
            }
        }
        Ok(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Keyring;
    use std::collections::HashMap;
    use std::convert::Infallible;

    type Nodes = HashMap<ChunkId, Vec<u8>>;

    fn build(runs: &[(u64, Option<u8>)]) -> (Shape, ChunkId, Nodes, Vec<Option<u8>>) {
        let chunks: u64 = runs.iter().map(|(count, _)| count).sum();
        let shape = Shape::of(chunks * 16384, 16384).expect("small");
        let mut nodes = Nodes::new();
        let keyring = Keyring::plain();
        let mut store = |level: u8, bytes: &[u8]| {
            let id = keyring.node_id(level, bytes);
            nodes.insert(id, bytes.to_vec());
            Ok::<_, Infallible>(id)
        };
        let mut tree = TreeBuilder::new(shape);
        let mut model = Vec::new();
        for (count, byte) in runs {
            match byte {
                None => tree.push_zeroes(*count, &mut store).expect("infallible"),
                Some(byte) => {
                    (0..*count).for_each(|_| tree.push(&ChunkId([*byte; 32]), &mut store).expect("infallible"))
                }
            }
            model.extend((0..*count).map(|_| *byte));
        }
        let root = tree.finish(&mut store).expect("infallible");
        (shape, root, nodes, model)
    }

    fn lookup(shape: Shape, root: ChunkId, nodes: &Nodes, chunk: u64) -> ChunkId {
        let mut id = root;
        for level in (0..shape.levels).rev() {
            if id.is_zero() {
                return id;
            }
            let node = Node::new(nodes[&id].clone().into()).expect("whole");
            id = node.child(chunk / (Shape::span(level) / FAN_OUT));
        }
        id
    }

    #[test]
    fn every_chunk_is_where_it_was_put() {
        let cases: [&[(u64, Option<u8>)]; 8] = [
            &[(1, Some(1))],
            &[(512, Some(1))],
            &[(513, Some(1))],
            &[(5, Some(1)), (1000, None), (3, Some(2))],
            &[(512 * 512, None), (1, Some(3))],
            &[(512 * 3, None), (7, Some(1)), (512 * 600, None), (1, Some(3)), (9, None)],
            &[(511, Some(1)), (1, None)],
            &[(512, None), (512, Some(4))],
        ];
        for runs in cases {
            let (shape, root, nodes, model) = build(runs);
            for (chunk, expected) in model.iter().enumerate() {
                let expected = ChunkId([expected.unwrap_or(0); 32]);
                assert_eq!(lookup(shape, root, &nodes, chunk as u64), expected, "{runs:?} chunk {chunk}");
            }
        }
    }

    #[test]
    fn a_disk_of_zeroes_has_the_root_zero_and_no_nodes() {
        for chunks in [1, 512, 513, 512 * 512 + 1, 1 << 40] {
            let shape = Shape::of(chunks * 16384, 16384).expect("fits");
            let mut tree = TreeBuilder::new(shape);
            let mut store = |_: u8, _: &[u8]| -> Result<ChunkId, Infallible> { panic!("nothing to store") };
            tree.push_zeroes(chunks, &mut store).expect("infallible");
            assert_eq!(tree.finish(&mut store).expect("infallible"), ChunkId::ZERO);
        }
    }

    #[test]
    fn the_shape_follows_from_the_size() {
        let levels = |chunks: u64| Shape::of(chunks * 65536, 65536).map(|shape| shape.levels);
        assert_eq!(Shape::of(0, 65536), Some(Shape { chunks: 1, levels: 1 }));
        assert_eq!(levels(512), Some(1));
        assert_eq!(levels(513), Some(2));
        assert_eq!(levels(512 * 512 + 1), Some(3));
        assert_eq!(Shape::of(1 << 62, 16384).map(|shape| shape.levels), Some(6));
        assert_eq!(Shape::of((1 << 62) + 1, 16384), None);
    }

    #[test]
    fn the_bytes_of_a_node_are_the_documented_ones() {
        let (_, root, nodes, _) = build(&[(1, None), (1, Some(9))]);
        let mut expected = vec![0; 32];
        expected.extend([9; 32]);
        expected.resize(16384, 0);
        assert_eq!(nodes[&root], expected);
        let mut hasher = blake3::Hasher::new_derive_key("lifeboat 1 plain node id");
        hasher.update(&[0]).update(&expected);
        assert_eq!(&root.0, hasher.finalize().as_bytes());
    }
}
