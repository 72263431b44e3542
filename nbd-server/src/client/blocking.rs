//! [`BlockingClient`]: the client for callers without a runtime.

use bytes::Bytes;
use tokio::runtime::Runtime;

use super::{Client, ClientError, ClientOptions};
use crate::export::{BlockSize, ContextExtent, Extent, ZeroMode};
use crate::uri::NbdUri;

/// A [`Client`] whose calls block. It brings its own small runtime, so it works from any thread that may block, also from
/// several at once; not from inside an async task.
pub struct BlockingClient {
    client: Client,
    /// Taken when dropped.
    runtime: Option<Runtime>,
}

macro_rules! blocking {
    ($self:ident, $call:expr) => {
        $self.runtime.as_ref().expect("taken only by drop").block_on($call)
    };
}

impl BlockingClient {
    /// As [`Client::connect`].
    pub fn connect(uri: &NbdUri, options: &ClientOptions) -> Result<BlockingClient, ClientError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("nbd-client")
            .enable_all()
            .build()
            .map_err(|source| ClientError::Connect { uri: uri.to_string(), source: source.into() })?;
        let client = runtime.block_on(Client::connect(uri, options))?;
        Ok(BlockingClient { client, runtime: Some(runtime) })
    }

    /// As [`Client::size`].
    pub fn size(&self) -> u64 {
        self.client.size()
    }

    /// As [`Client::flags`].
    pub fn flags(&self) -> u16 {
        self.client.flags()
    }

    /// As [`Client::read_only`].
    pub fn read_only(&self) -> bool {
        self.client.read_only()
    }

    /// As [`Client::block_size`].
    pub fn block_size(&self) -> BlockSize {
        self.client.block_size()
    }

    /// As [`Client::contexts`].
    pub fn contexts(&self) -> impl Iterator<Item = &str> {
        self.client.contexts()
    }

    /// As [`Client::read`].
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ClientError> {
        blocking!(self, self.client.read(offset, buffer))
    }

    /// As [`Client::read_bytes`].
    pub fn read_bytes(&self, offset: u64, length: usize) -> Result<Bytes, ClientError> {
        blocking!(self, self.client.read_bytes(offset, length))
    }

    /// As [`Client::write`].
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        blocking!(self, self.client.write(offset, data))
    }

    /// As [`Client::write_durable`].
    pub fn write_durable(&self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        blocking!(self, self.client.write_durable(offset, data))
    }

    /// As [`Client::flush`].
    pub fn flush(&self) -> Result<(), ClientError> {
        blocking!(self, self.client.flush())
    }

    /// As [`Client::trim`].
    pub fn trim(&self, offset: u64, length: u64) -> Result<(), ClientError> {
        blocking!(self, self.client.trim(offset, length))
    }

    /// As [`Client::write_zeroes`].
    pub fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), ClientError> {
        blocking!(self, self.client.write_zeroes(offset, length, mode))
    }

    /// As [`Client::block_status`].
    pub fn block_status(&self, offset: u64, length: u64) -> Result<Vec<Extent>, ClientError> {
        blocking!(self, self.client.block_status(offset, length))
    }

    /// As [`Client::context_status`].
    pub fn context_status(&self, context: &str, offset: u64, length: u64) -> Result<Vec<ContextExtent>, ClientError> {
        blocking!(self, self.client.context_status(context, offset, length))
    }

    /// As [`Client::disconnect`].
    pub fn disconnect(&self) {
        blocking!(self, self.client.disconnect());
    }
}

impl Drop for BlockingClient {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background(); // nothing to wait for, and allowed anywhere
        }
    }
}
