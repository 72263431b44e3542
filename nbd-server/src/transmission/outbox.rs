//! [`Outbox`]: replies of one connection on their way into its socket.
//!
//! Any thread submits. The first that finds nobody writing becomes the writer and goes on until nothing is left, so
//! a worker's answer leaves without a switch to another task, and answers that come together leave in one system
//! call. Nobody ever waits here: when the socket is full the rest stays behind, and the connection's task, which
//! alone waits for the socket, goes on with [`Outbox::resume`].

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::reply::{Batch, Cursor};
use crate::stream::Stream;

#[derive(Debug)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    /// Bytes submitted and not yet written.
    queued: AtomicUsize,
    /// Bytes ever written: whether a client takes anything at all.
    written: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    pending: Batch,
    /// An empty batch whose capacity is used again.
    spare: Batch,
    writer: Writer,
}

#[derive(Debug, Default)]
enum Writer {
    #[default]
    Idle,
    /// A thread is in `drive`.
    Active,
    /// The socket was full; the rest of this batch goes first.
    Blocked(Batch, Cursor),
    /// The socket failed; whatever comes is dropped.
    Broken,
}

/// What a submission led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sent {
    /// Everything is written, or another thread is writing it.
    Underway,
    /// The socket is full: [`Outbox::resume`] when it is writable.
    Blocked,
    /// The socket has failed.
    Broken,
}

impl Outbox {
    pub(crate) fn new() -> Outbox {
        Outbox { state: Mutex::default(), queued: AtomicUsize::new(0), written: AtomicU64::new(0) }
    }

    /// Bytes that wait for the client.
    pub(crate) fn queued(&self) -> usize {
        self.queued.load(Ordering::SeqCst)
    }

    /// Bytes written since the connection began.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Takes everything out of `batch` and writes what the socket takes.
    pub(crate) fn submit(&self, stream: &Stream, batch: &mut Batch) -> Sent {
        let mut state = self.lock();
        match state.writer {
            Writer::Broken => {
                batch.clear();
                return Sent::Broken;
            }
            Writer::Active => {
                self.queued.fetch_add(batch.len(), Ordering::SeqCst);
                state.pending.append(batch);
                return Sent::Underway;
            }
            Writer::Blocked(..) => {
                self.queued.fetch_add(batch.len(), Ordering::SeqCst);
                state.pending.append(batch);
                return Sent::Blocked;
            }
            Writer::Idle => {}
        }
        if batch.is_empty() {
            return Sent::Underway;
        }
        self.queued.fetch_add(batch.len(), Ordering::SeqCst);
        state.pending.append(batch);
        state.writer = Writer::Active;
        let next = take_pending(&mut state);
        drop(state);
        self.drive(stream, next, Cursor::default())
    }

    /// Goes on after the socket was full.
    pub(crate) fn resume(&self, stream: &Stream) -> Sent {
        let mut state = self.lock();
        match std::mem::replace(&mut state.writer, Writer::Active) {
            Writer::Blocked(batch, cursor) => {
                drop(state);
                self.drive(stream, batch, cursor)
            }
            Writer::Idle => {
                state.writer = Writer::Idle;
                Sent::Underway
            }
            Writer::Active => Sent::Underway,
            Writer::Broken => {
                state.writer = Writer::Broken;
                Sent::Broken
            }
        }
    }

    /// How it stands, for the connection's task.
    pub(crate) fn status(&self) -> Sent {
        match self.lock().writer {
            Writer::Idle | Writer::Active => Sent::Underway,
            Writer::Blocked(..) => Sent::Blocked,
            Writer::Broken => Sent::Broken,
        }
    }

    /// The writer's loop; the state is `Active` on entry.
    fn drive(&self, stream: &Stream, mut batch: Batch, mut cursor: Cursor) -> Sent {
        loop {
            match self.write(stream, &batch, &mut cursor) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.lock().writer = Writer::Blocked(batch, cursor);
                    return Sent::Blocked;
                }
                Err(error) => {
                    tracing::debug!(%error, "cannot write to the client");
                    let mut state = self.lock();
                    state.writer = Writer::Broken;
                    state.pending.clear();
                    self.queued.store(0, Ordering::SeqCst);
                    return Sent::Broken;
                }
            }
            batch.clear();
            cursor = Cursor::default();
            let mut state = self.lock();
            if state.pending.is_empty() {
                state.writer = Writer::Idle;
                state.spare = batch;
                return Sent::Underway;
            }
            let next = take_pending(&mut state);
            state.spare = std::mem::replace(&mut batch, next);
        }
    }

    fn write(&self, stream: &Stream, batch: &Batch, cursor: &mut Cursor) -> io::Result<()> {
        while let Some(result) = batch.with_slices(cursor, |slices| stream.try_write_vectored(slices)) {
            match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    batch.advance(cursor, count);
                    self.queued.fetch_sub(count, Ordering::SeqCst);
                    self.written.fetch_add(count as u64, Ordering::Relaxed);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        stream.try_flush()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take_pending(state: &mut State) -> Batch {
    let spare = std::mem::take(&mut state.spare);
    std::mem::replace(&mut state.pending, spare)
}
