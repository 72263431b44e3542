//! [`PackBuilder`]: frames in, the bytes of a pack out.

use std::io;

use crate::format::pack::{
    FLAG_ZSTD, Frame, HEADER_LEN, Header, MAX_FRAMES, PackKind, TARGET_PACK_LEN, associated_data, encode_end,
};
use crate::format::{Encryption, TAG_LEN};
use crate::id::{ChunkId, RepositoryId};
use crate::keys::{Cipher, Keyring, frame_nonce};
use crate::pack::buffer::PackBuffer;

/// A pack in the making.
pub(crate) struct PackBuilder {
    header: Header,
    cipher: Option<Cipher>,
    bytes: PackBuffer,
    frames: Vec<Frame>,
}

/// A frame's payload before it is sealed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Payload<'a> {
    pub id: ChunkId,
    pub bytes: &'a [u8],
    pub plain_len: u32,
    pub compressed: bool,
    pub level: u8,
}

/// The bytes of a complete pack, and what its table says.
pub(crate) struct FinishedPack {
    pub header: Header,
    pub bytes: PackBuffer,
    pub frames: Vec<Frame>,
}

impl PackBuilder {
    /// An empty pack. `salt` must be random; `buffer` is reused.
    pub fn new(
        kind: PackKind,
        repository: RepositoryId,
        keyring: &Keyring,
        salt: [u8; 32],
        mut buffer: PackBuffer,
    ) -> PackBuilder {
        let cipher = keyring.pack_cipher(&salt);
        let encryption = if cipher.is_some() { Encryption::Aes256Gcm } else { Encryption::None };
        let header = Header { kind, encryption, repository, salt, gathered: false };
        buffer.clear();
        buffer.extend(&header.encode());
        PackBuilder { header, cipher, bytes: buffer, frames: Vec::new() }
    }

    /// The same for second copies that are better read from this pack than from where they stand.
    pub fn gathered(mut self) -> PackBuilder {
        self.header.gathered = true;
        self.bytes.clear();
        self.bytes.extend(&self.header.encode());
        self.frames.clear();
        self
    }

    /// Whether the pack should be finished before another frame is added.
    pub fn is_full(&self) -> bool {
        self.bytes.len() >= TARGET_PACK_LEN as usize || self.frames.len() >= MAX_FRAMES as usize
    }

    /// Whether it has no frame.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Seals and appends a frame. The pack must not be full.
    pub fn append(&mut self, payload: Payload<'_>) -> io::Result<()> {
        let Payload { id, bytes, plain_len, compressed, level } = payload;
        let too_large = || io::Error::from(io::ErrorKind::FileTooLarge);
        let number = u32::try_from(self.frames.len()).map_err(|_| too_large())?;
        let offset = u32::try_from(self.bytes.len()).map_err(|_| too_large())?;
        let flags = if compressed { FLAG_ZSTD } else { 0 };
        let mut stored_len = u32::try_from(bytes.len()).map_err(|_| too_large())?;
        self.bytes.extend(bytes);
        if let Some(cipher) = &self.cipher {
            let message = self.bytes.get_mut(offset as usize..).unwrap_or_default();
            let data = associated_data(&id, plain_len, flags, level);
            let tag = cipher.seal(&frame_nonce(number), &data, message).ok_or_else(too_large)?;
            self.bytes.extend(&tag);
            stored_len += TAG_LEN;
        }
        self.frames.push(Frame { id, offset, stored_len, plain_len, flags, level });
        Ok(())
    }

    /// Completes the pack.
    pub fn finish(mut self) -> io::Result<FinishedPack> {
        let table_offset = u32::try_from(self.bytes.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        debug_assert!(table_offset >= HEADER_LEN);
        encode_end(&self.frames, table_offset, self.bytes.end());
        Ok(FinishedPack { header: self.header, bytes: self.bytes, frames: self.frames })
    }
}

/// Compresses into a buffer that is reused, or says to store raw because that would not save 3 %.
pub(crate) struct Compressor {
    context: zstd::bulk::Compressor<'static>,
    buffer: Vec<u8>,
}

/// Level of zstd: on chunks of 64 KiB of a Debian system, 1 takes 3 % more room for a fifth less time; 9 would save 3 %
/// for several times as much.
const ZSTD_LEVEL: i32 = 3;

impl Compressor {
    /// A context and its buffer; to be used for many frames.
    pub fn new() -> io::Result<Compressor> {
        Ok(Compressor { context: zstd::bulk::Compressor::new(ZSTD_LEVEL)?, buffer: Vec::new() })
    }

    /// What to store for `plain`, and whether it is compressed.
    pub fn compress<'a>(&'a mut self, plain: &'a [u8]) -> (&'a [u8], bool) {
        let limit = plain.len() - plain.len() * 3 / 100;
        self.buffer.clear();
        self.buffer.reserve_exact(limit);
        // An output that does not fit the buffer is an error, which means the same: store raw.
        match self.context.compress_to_buffer(plain, &mut self.buffer) {
            Ok(len) if len < limit => (&self.buffer, true),
            _ => (plain, false),
        }
    }
}
