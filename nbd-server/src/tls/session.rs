//! [`Session`]: a TLS connection over a socket that never waits.
//!
//! Reader and writers meet on one lock, which is held for the encryption of at most [`OUTGOING_MAX`] bytes. What the
//! socket does not take stays inside, bounded by the same number, and goes first the next time.

use std::io::{self, IoSlice, Read, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::BufMut;
use rustls::Connection;
use rustls::pki_types::CertificateDer;

use crate::stream::Socket;

/// Read from the socket at once: two records.
const INCOMING: usize = 32 << 10;

/// Encrypted bytes that may wait for the socket.
const OUTGOING_MAX: usize = 256 << 10;

#[derive(Debug)]
pub(crate) struct Session {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    connection: Connection,
    incoming: Incoming,
}

/// Encrypted bytes as they came from the socket.
#[derive(Debug)]
struct Incoming {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Session {
    /// Leads the handshake, as client or server. What the peer sent before it does not count: nothing has been read.
    pub(crate) async fn establish(socket: &Socket, mut connection: Connection) -> io::Result<Session> {
        connection.set_buffer_limit(Some(OUTGOING_MAX));
        let incoming = Incoming { buffer: vec![0; INCOMING], start: 0, end: 0 };
        let mut inner = Inner { connection, incoming };
        loop {
            match inner.send(socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    socket.writable().await?;
                    continue;
                }
                sent => sent?,
            }
            if !inner.connection.is_handshaking() {
                return Ok(Session { inner: Mutex::new(inner) });
            }
            match inner.receive(socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.readable().await?,
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                received => received.map(drop)?,
            }
        }
    }

    /// The certificate that the peer has shown and proved to own.
    pub(crate) fn peer_certificate(&self) -> Option<CertificateDer<'static>> {
        self.lock().connection.peer_certificates().and_then(|chain| chain.first().cloned())
    }

    pub(crate) fn try_read(&self, socket: &Socket, buffer: &mut [u8]) -> io::Result<usize> {
        let mut inner = self.lock();
        loop {
            match inner.connection.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => inner.receive(socket).map(drop)?,
                read => return read,
            }
        }
    }

    /// Reads into spare capacity. There is no way around initialised memory here: it is filled in small steps.
    pub(crate) fn try_read_buf(&self, socket: &Socket, buffer: &mut impl BufMut) -> io::Result<usize> {
        const STEP: usize = 16 << 10; // one record
        let mut bytes = [0; STEP];
        let length = buffer.remaining_mut().min(STEP);
        let read = self.try_read(socket, bytes.split_at_mut(length).0)?;
        buffer.put_slice(bytes.split_at(read).0);
        Ok(read)
    }

    pub(crate) fn try_write_vectored(&self, socket: &Socket, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut inner = self.lock();
        inner.send(socket)?;
        let taken = inner.connection.writer().write_vectored(slices)?;
        match inner.send(socket) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(taken),
        }
    }

    pub(crate) fn try_flush(&self, socket: &Socket) -> io::Result<()> {
        self.lock().send(socket)
    }

    /// Says goodbye as far as the socket takes it now.
    pub(crate) fn close(&self, socket: &Socket) {
        let mut inner = self.lock();
        inner.connection.send_close_notify();
        let _ = inner.send(socket); // the end of the stream follows in any case
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Sends what waits; `WouldBlock` if the socket does not take all of it.
    fn send(&mut self, socket: &Socket) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut Outgoing(socket)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes in what the socket has; 0 at its end.
    fn receive(&mut self, socket: &Socket) -> io::Result<usize> {
        if self.incoming.start == self.incoming.end {
            (self.incoming.start, self.incoming.end) = (0, 0);
            self.incoming.end = socket.try_read(&mut self.incoming.buffer)?;
        }
        let count = self.connection.read_tls(&mut self.incoming)?;
        if let Err(error) = self.connection.process_new_packets() {
            let _ = self.send(socket); // the alert that tells the peer why
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        Ok(count)
    }
}

impl Read for Incoming {
    fn read(&mut self, place: &mut [u8]) -> io::Result<usize> {
        let waiting = self.buffer.get(self.start..self.end).unwrap_or(&[]);
        let count = waiting.len().min(place.len());
        place.split_at_mut(count).0.copy_from_slice(waiting.split_at(count).0);
        self.start += count;
        Ok(count)
    }
}

struct Outgoing<'a>(&'a Socket);

impl Write for Outgoing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
