//! One request against the export, on a thread that may block: call, check what came back, encode the answer.

use super::reply::{Position, Reply};
use super::request::{Command, Extents, Request};
use crate::export::{ContextExtent, ExportError, ExtentKind, Piece};
use crate::handshake::{Context, ContextSource};
use crate::limits::MAX_EXTENTS;
use crate::statistics::{Operation, Outcome};
use crate::table::Published;
use crate::wire::{Errno, state};

/// The one map from an export's failures to the wire.
pub(crate) fn errno(error: ExportError) -> Errno {
    match error {
        ExportError::Io => Errno::Io,
        ExportError::NoSpace => Errno::NoSpc,
        ExportError::ReadOnly => Errno::Perm,
        ExportError::Invalid => Errno::Inval,
        ExportError::NotSupported => Errno::NotSup,
        ExportError::ShuttingDown => Errno::Shutdown,
    }
}

/// How the request is counted; `None` for what never reaches an export.
pub(super) fn operation(command: Command) -> Option<Operation> {
    match command {
        Command::Read { .. } => Some(Operation::Read),
        Command::Write => Some(Operation::Write),
        Command::Flush => Some(Operation::Flush),
        Command::Trim => Some(Operation::Trim),
        Command::Cache => Some(Operation::Cache),
        Command::WriteZeroes(_) => Some(Operation::WriteZeroes),
        Command::BlockStatus { .. } => Some(Operation::BlockStatus),
        Command::Disconnect => None,
    }
}

/// Performs a checked request and encodes the answer. `payload` is what a write writes.
pub(crate) fn execute(
    published: &Published,
    contexts: &[Context],
    request: &Request,
    payload: &[u8],
    reply: &mut Reply<'_>,
) {
    let result = answer(published, contexts, request, payload, reply);
    if let Err(error) = result {
        tracing::debug!(export = %published.name, cookie = request.cookie, ?request.command, %error, "request failed");
        reply.error(errno(error), &error.to_string());
    }
    record(published, request, if result.is_ok() { Outcome::Done } else { Outcome::Failed });
}

/// Counts a request.
pub(crate) fn record(published: &Published, request: &Request, outcome: Outcome) {
    if let Some(operation) = operation(request.command) {
        published.statistics.record(operation, request.length, outcome);
    }
}

/// Everything that can fail happens before the first byte of the answer is encoded.
fn answer(
    published: &Published,
    contexts: &[Context],
    request: &Request,
    payload: &[u8],
    reply: &mut Reply<'_>,
) -> Result<(), ExportError> {
    let export = &published.export;
    let (offset, length) = (request.offset, request.length);
    match request.command {
        Command::Read { fragment } => {
            let mut pieces = Vec::new();
            if length > 0 {
                let short = u32::try_from(length).map_err(|_| ExportError::Invalid)?;
                export.read(offset, short, &mut pieces)?;
            }
            check_cover(published, &pieces, length)?;
            reply.read(&mut pieces, length, fragment);
            return Ok(());
        }
        Command::BlockStatus { extents, contexts: wanted } => {
            let mut answers = Vec::with_capacity(contexts.len());
            for context in contexts.iter().filter(|context| wanted.contains(context.id)) {
                answers.push((context.id, status(published, context, request, extents)?));
            }
            let last = answers.len().saturating_sub(1);
            for (at, (id, extents)) in answers.iter().enumerate() {
                let position = if at == last { Position::Last } else { Position::MoreFollow };
                reply.block_status(*id, extents, position);
            }
            return Ok(());
        }
        Command::Write if length > 0 => export.write(offset, payload)?,
        Command::WriteZeroes(mode) if length > 0 => export.write_zeroes(offset, length, mode)?,
        Command::Trim if length > 0 => export.trim(offset, length)?,
        Command::Cache if length > 0 => export.cache(offset, length)?,
        Command::Flush => export.flush()?,
        Command::Write | Command::WriteZeroes(_) | Command::Trim | Command::Cache | Command::Disconnect => {}
    }
    if request.fua {
        export.flush()?; // after the write has returned, so that this flush covers it
    }
    reply.done();
    Ok(())
}

/// An export that answers with too little or too much would shift every later reply.
pub(crate) fn check_cover(published: &Published, pieces: &[Piece], length: u64) -> Result<(), ExportError> {
    let mut covered = 0_u64;
    for piece in pieces {
        covered = covered.checked_add(piece.len()).ok_or(ExportError::Io)?;
    }
    if covered == length && !pieces.iter().any(Piece::is_empty) {
        return Ok(());
    }
    tracing::error!(export = %published.name, covered, length, "the export answered a read with the wrong length");
    Err(ExportError::Io)
}

/// Descriptors of one context: clipped to the request, neighbours that say the same joined, never none.
fn status(
    published: &Published,
    context: &Context,
    request: &Request,
    extents: Extents,
) -> Result<Vec<(u64, u32)>, ExportError> {
    let limit = match extents {
        Extents::One => 1,
        Extents::Many => MAX_EXTENTS,
    };
    let (offset, length) = (request.offset, request.length);
    let found: Vec<ContextExtent> = match &context.source {
        ContextSource::BaseAllocation => {
            let extents = published.export.extents(offset, length, limit)?;
            extents.iter().map(|e| ContextExtent { length: e.length, flags: allocation(e.kind) }).collect()
        }
        ContextSource::Own(name) => published.export.context_extents(name, offset, length, limit)?,
    };
    let mut joined: Vec<(u64, u32)> = Vec::with_capacity(found.len().min(limit));
    let mut left = length;
    for extent in found {
        let clipped = extent.length.min(left);
        if clipped == 0 {
            break;
        }
        let full = joined.len() == limit;
        match joined.last_mut() {
            Some((length, flags)) if *flags == extent.flags => *length += clipped,
            _ if full => break,
            _ => joined.push((clipped, extent.flags)),
        }
        left -= clipped;
    }
    if joined.is_empty() {
        tracing::error!(export = %published.name, "the export says nothing about a range it was asked about");
        return Err(ExportError::Io);
    }
    Ok(joined)
}

fn allocation(kind: ExtentKind) -> u32 {
    match kind {
        ExtentKind::Data => 0,
        ExtentKind::Hole => state::HOLE | state::ZERO,
        ExtentKind::AllocatedZero => state::ZERO,
    }
}
