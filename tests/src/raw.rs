//! An NBD client in raw bytes, for what no client in its right would send: the old form of the handshake, simple replies.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::PATIENCE;

/// Bytes of a simple reply before its data.
pub const SIMPLE_REPLY: usize = 16;

/// A connection on which nothing has been said.
pub fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
    stream.set_read_timeout(Some(PATIENCE)).unwrap_or_else(|error| panic!("no timeout: {error}"));
    stream
}

/// A client that may send requests to `export`.
pub fn transmitting(socket: &Path, export: &str) -> io::Result<UnixStream> {
    let mut stream = connect(socket);
    stream.read_exact(&mut [0; 18])?;
    let length = u32::try_from(export.len()).map_err(io::Error::other)?.to_be_bytes();
    stream.write_all(&[b"\0\0\0\x03IHAVEOPT\0\0\0\x01", &length[..], export.as_bytes()].concat())?;
    stream.read_exact(&mut [0; 10])?;
    Ok(stream)
}

/// The header of a request.
pub fn request(command: u8, offset: u64, length: u32) -> Vec<u8> {
    let mut request = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, command];
    request.extend([0; 8]);
    request.extend(offset.to_be_bytes());
    request.extend(length.to_be_bytes());
    request
}
