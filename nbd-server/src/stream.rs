//! [`Stream`]: a connected socket, plain or with TLS, read and written without waiting from any thread.

use std::io::{self, IoSlice};

use tokio::net::{TcpStream, UnixStream};

use crate::tls::Session;

/// A connected socket.
#[derive(Debug)]
pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

macro_rules! each {
    ($stream:expr, $socket:ident => $call:expr) => {
        match $stream {
            Socket::Unix($socket) => $call,
            Socket::Tcp($socket) => $call,
        }
    };
}

impl Socket {
    pub(crate) fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        each!(self, socket => socket.try_read(buffer))
    }

    fn try_read_buf(&self, buffer: &mut impl bytes::BufMut) -> io::Result<usize> {
        each!(self, socket => socket.try_read_buf(buffer))
    }

    pub(crate) fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        each!(self, socket => socket.try_write_vectored(slices))
    }

    pub(crate) async fn readable(&self) -> io::Result<()> {
        each!(self, socket => socket.readable().await)
    }

    pub(crate) async fn writable(&self) -> io::Result<()> {
        each!(self, socket => socket.writable().await)
    }

    fn shutdown_write(&self) -> io::Result<()> {
        each!(self, socket => rustix::net::shutdown(socket, rustix::net::Shutdown::Write).map_err(io::Error::from))
    }
}

/// A socket, and the TLS session on it once there is one.
///
/// With TLS, bytes that were taken may still wait inside the session for the socket: a writer is done when
/// [`Stream::try_flush`] has succeeded. Waiting is for the socket in either case, and only after `WouldBlock`.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: Socket,
    tls: Option<Session>,
}

impl Stream {
    pub(crate) fn unix(socket: UnixStream) -> Stream {
        Stream { socket: Socket::Unix(socket), tls: None }
    }

    /// Replies are small and waited for: nothing is held back.
    pub(crate) fn tcp(socket: TcpStream) -> io::Result<Stream> {
        socket.set_nodelay(true)?;
        Ok(Stream { socket: Socket::Tcp(socket), tls: None })
    }

    /// Leads the TLS handshake; everything after it is protected.
    pub(crate) async fn start_tls(&mut self, connection: impl Into<rustls::Connection>) -> io::Result<()> {
        self.tls = Some(Session::establish(&self.socket, connection.into()).await?);
        Ok(())
    }

    /// The TLS session, if there is one.
    pub(crate) fn tls(&self) -> Option<&Session> {
        self.tls.as_ref()
    }

    pub(crate) fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.tls {
            None => self.socket.try_read(buffer),
            Some(session) => session.try_read(&self.socket, buffer),
        }
    }

    /// Reads into spare capacity, at most what `buffer` says remains.
    pub(crate) fn try_read_buf(&self, buffer: &mut impl bytes::BufMut) -> io::Result<usize> {
        match &self.tls {
            None => self.socket.try_read_buf(buffer),
            Some(session) => session.try_read_buf(&self.socket, buffer),
        }
    }

    pub(crate) fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match &self.tls {
            None => self.socket.try_write_vectored(slices),
            Some(session) => session.try_write_vectored(&self.socket, slices),
        }
    }

    /// Hands everything that was written to the socket.
    pub(crate) fn try_flush(&self) -> io::Result<()> {
        match &self.tls {
            None => Ok(()),
            Some(session) => session.try_flush(&self.socket),
        }
    }

    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    pub(crate) async fn writable(&self) -> io::Result<()> {
        self.socket.writable().await
    }

    /// Fills the buffer; the end of the stream before that is an error.
    pub(crate) async fn read_exact(&self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.try_read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => buffer = buffer.split_at_mut(count).1,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable().await?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.try_write_vectored(&[IoSlice::new(bytes)]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => bytes = bytes.split_at(count).1,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable().await?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.flush().await
    }

    pub(crate) async fn flush(&self) -> io::Result<()> {
        loop {
            match self.try_flush() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable().await?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                flushed => return flushed,
            }
        }
    }

    /// Ends the sending side, and waits until the peer has ended its own.
    pub(crate) async fn drain_to_end(&self) -> io::Result<()> {
        self.shutdown_write()?;
        let mut scrap = [0; 4096];
        loop {
            match self.try_read(&mut scrap) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable().await?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Ends the sending side: the peer reads what was sent, then the end.
    pub(crate) fn shutdown_write(&self) -> io::Result<()> {
        if let Some(session) = &self.tls {
            session.close(&self.socket);
        }
        self.socket.shutdown_write()
    }
}
