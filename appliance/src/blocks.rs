//! Reads and writes of any alignment on an NBD export that serves whole blocks only.

use std::io;

use nbd_server::export::ZeroMode;
use nbd_server::{BlockingClient, ClientError};

/// Zeroes are written in steps of this where they cannot be asked for; a multiple of every block size.
const ZERO_STEP: u64 = 1 << 20;

/// The blocks around a range: where they begin, and how many bytes they have.
fn around(client: &BlockingClient, offset: u64, length: usize) -> (u64, usize) {
    let block = u64::from(client.block_size().minimum.max(1));
    let start = offset - offset % block;
    let end = (offset + length as u64).next_multiple_of(block);
    (start, usize::try_from(end - start).unwrap_or(usize::MAX))
}

/// Fills `buf` from `offset`.
pub fn read(client: &BlockingClient, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let (start, length) = around(client, offset, buf.len());
    if length == buf.len() {
        return client.read(offset, buf).map_err(io::Error::other);
    }
    let mut blocks = vec![0; length];
    client.read(start, &mut blocks).map_err(io::Error::other)?;
    buf.copy_from_slice(inside(&mut blocks, offset - start, buf.len()));
    Ok(())
}

/// Writes `data` at `offset`. Nobody else may write to the same blocks meanwhile.
pub fn write(client: &BlockingClient, offset: u64, data: &[u8]) -> io::Result<()> {
    let (start, length) = around(client, offset, data.len());
    if length == data.len() {
        return client.write(offset, data).map_err(io::Error::other);
    }
    let mut blocks = vec![0; length];
    client.read(start, &mut blocks).map_err(io::Error::other)?;
    inside(&mut blocks, offset - start, data.len()).copy_from_slice(data);
    client.write(start, &blocks).map_err(io::Error::other)
}

/// Makes a range read as zeroes; they are written where they cannot be asked for. As for [`write`], nobody else may write
/// to the same blocks meanwhile.
pub fn zero(client: &BlockingClient, offset: u64, length: u64, mode: ZeroMode) -> io::Result<()> {
    let block = u64::from(client.block_size().minimum.max(1));
    let end = offset + length;
    // Whole blocks, and what is before and after them.
    let first = offset.next_multiple_of(block).min(end);
    let last = (end - end % block).max(first);
    write_zeroes(client, offset, first)?;
    if last > first {
        match client.write_zeroes(first, last - first, mode) {
            Err(ClientError::NotOffered(_)) => write_zeroes(client, first, last)?,
            done => done.map_err(io::Error::other)?,
        }
    }
    write_zeroes(client, last, end)
}

fn write_zeroes(client: &BlockingClient, from: u64, to: u64) -> io::Result<()> {
    let zeroes = vec![0; usize::try_from((to - from).min(ZERO_STEP)).unwrap_or(0)];
    let mut at = from;
    while at < to {
        let step = zeroes.len().min(usize::try_from(to - at).unwrap_or(usize::MAX));
        write(client, at, zeroes.get(..step).unwrap_or(&zeroes))?;
        at += step as u64;
    }
    Ok(())
}

fn inside(blocks: &mut [u8], from: u64, length: usize) -> &mut [u8] {
    let from = usize::try_from(from).unwrap_or(usize::MAX);
    blocks.get_mut(from..from.saturating_add(length)).expect("a range lies inside the blocks around it")
}
