//! The handshake, client side: structured replies, metadata contexts, then GO; the old form for servers without GO.

use std::io;
use std::sync::Arc;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{ClientError, ClientOptions, OptionRefusal, Violation};
use crate::export::BlockSize;
use crate::limits::{MAX_CONTEXTS, MAX_PAYLOAD};
use crate::name::ExportName;
use crate::stream::Stream;
use crate::transmission::HeaderStyle;
use crate::uri::NbdUri;
use crate::wire::{
    EXPORT_NAME_PADDING, INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, RawExportNameAnswer, RawGreeting, RawOption,
    RawOptionReply, client_flag, handshake_flag, info, option, option_reply,
};

/// Largest option reply that is read: two strings of the protocol's maximum.
const MAX_REPLY: u32 = 16 << 10;

/// Replies to one option: the information types and contexts a server may send us are far fewer.
const MAX_REPLIES: usize = 256;

/// What client and server have settled.
#[derive(Debug, Clone)]
pub(super) struct Agreed {
    pub(super) size: u64,
    pub(super) flags: u16,
    pub(super) block_size: BlockSize,
    pub(super) style: HeaderStyle,
    /// Selected contexts with the numbers replies use.
    pub(super) contexts: Vec<(u32, String)>,
}

fn violation<T>(violation: Violation) -> Result<T, ClientError> {
    Err(ClientError::Protocol(violation))
}

fn lost(error: io::Error) -> ClientError {
    ClientError::Lost(Some(Arc::new(error)))
}

/// The answers to one option up to the final one.
struct Answers {
    replies: Vec<(u32, Vec<u8>)>,
    refusal: Option<OptionRefusal>,
}

pub(super) async fn negotiate(
    stream: &mut Stream,
    uri: &NbdUri,
    tls: Option<rustls::ClientConnection>,
    options: &ClientOptions,
) -> Result<Agreed, ClientError> {
    let export = &uri.export;
    let no_zeroes = greet(stream).await?;
    if let Some(connection) = tls {
        if let Some(refusal) = ask(stream, option::STARTTLS, &[]).await?.refusal {
            return Err(ClientError::Refused { export: export.to_string(), refusal });
        }
        let failed = |source: io::Error| ClientError::TlsHandshake { uri: uri.to_string(), source: Arc::new(source) };
        stream.start_tls(connection).await.map_err(failed)?;
    }
    let stream: &Stream = stream;
    let style = settle_style(stream, options.headers).await?;
    let selected = if style.is_structured() { select(stream, export, &options.contexts).await? } else { Vec::new() };
    let mut data = Vec::new();
    string(&mut data, export.as_str());
    data.extend_from_slice(U16::new(1).as_bytes());
    data.extend_from_slice(U16::new(info::BLOCK_SIZE).as_bytes());
    let answers = ask(stream, option::GO, &data).await?;
    let (size, flags, block_size) = match answers.refusal {
        None => facts(&answers.replies)?,
        Some(refusal) if refusal.kind == option_reply::ERR_UNSUP && style != HeaderStyle::Extended => {
            let (size, flags) = old_form(stream, export, no_zeroes).await?;
            (size, flags, default_sizes())
        }
        Some(refusal) => return Err(ClientError::Refused { export: export.to_string(), refusal }),
    };
    Ok(Agreed { size, flags, block_size, style, contexts: selected })
}

/// The best that the server has, up to what is wanted.
async fn settle_style(stream: &Stream, best: HeaderStyle) -> Result<HeaderStyle, ClientError> {
    for (kind, style) in
        [(option::EXTENDED_HEADERS, HeaderStyle::Extended), (option::STRUCTURED_REPLY, HeaderStyle::Structured)]
    {
        if style <= best && ask(stream, kind, &[]).await?.refusal.is_none() {
            return Ok(style);
        }
    }
    Ok(HeaderStyle::Simple)
}

/// Exchanges greetings; returns whether padding is left out.
async fn greet(stream: &Stream) -> Result<bool, ClientError> {
    let mut greeting = RawGreeting::new_zeroed();
    stream.read_exact(greeting.as_mut_bytes()).await.map_err(lost)?;
    let flags = greeting.flags.get();
    let known = greeting.init_magic.get() == INIT_MAGIC && greeting.option_magic.get() == OPTION_MAGIC;
    if !known || flags & handshake_flag::FIXED_NEWSTYLE == 0 {
        return violation(Violation::Greeting);
    }
    let no_zeroes = flags & handshake_flag::NO_ZEROES != 0;
    let ours = client_flag::FIXED_NEWSTYLE | if no_zeroes { client_flag::NO_ZEROES } else { 0 };
    stream.write_all(U32::new(ours).as_bytes()).await.map_err(lost)?;
    Ok(no_zeroes)
}

fn string(data: &mut Vec<u8>, text: &str) {
    data.extend_from_slice(U32::new(u32::try_from(text.len()).unwrap_or(u32::MAX)).as_bytes());
    data.extend_from_slice(text.as_bytes());
}

async fn send(stream: &Stream, kind: u32, data: &[u8]) -> Result<(), ClientError> {
    let length = U32::new(u32::try_from(data.len()).unwrap_or(u32::MAX));
    let raw = RawOption { magic: U64::new(OPTION_MAGIC), option: U32::new(kind), length };
    let mut message = raw.as_bytes().to_vec();
    message.extend_from_slice(data);
    stream.write_all(&message).await.map_err(lost)
}

/// Sends an option and reads replies until the final one.
async fn ask(stream: &Stream, kind: u32, data: &[u8]) -> Result<Answers, ClientError> {
    send(stream, kind, data).await?;
    let mut replies = Vec::new();
    for _ in 0..MAX_REPLIES {
        let mut raw = RawOptionReply::new_zeroed();
        stream.read_exact(raw.as_mut_bytes()).await.map_err(lost)?;
        if raw.magic.get() != OPTION_REPLY_MAGIC {
            return violation(Violation::Magic(raw.magic.get()));
        }
        if raw.option.get() != kind {
            return violation(Violation::UnexpectedOptionReply);
        }
        if raw.length.get() > MAX_REPLY {
            return violation(Violation::OptionReply);
        }
        let mut data = vec![0; raw.length.get() as usize]; // at most MAX_REPLY
        stream.read_exact(&mut data).await.map_err(lost)?;
        match raw.kind.get() {
            option_reply::ACK => return Ok(Answers { replies, refusal: None }),
            kind if kind & option_reply::ERROR != 0 => {
                let text = String::from_utf8_lossy(&data);
                let message = text.chars().filter(|c| !c.is_control()).take(256).collect();
                return Ok(Answers { replies, refusal: Some(OptionRefusal { kind, message }) });
            }
            kind => replies.push((kind, data)),
        }
    }
    violation(Violation::OptionReply)
}

/// Selects contexts; a server that has none of them, or none at all, is fine.
async fn select(stream: &Stream, export: &ExportName, contexts: &[String]) -> Result<Vec<(u32, String)>, ClientError> {
    if contexts.is_empty() {
        return Ok(Vec::new());
    }
    let mut data = Vec::new();
    string(&mut data, export.as_str());
    data.extend_from_slice(U32::new(u32::try_from(contexts.len()).unwrap_or(u32::MAX)).as_bytes());
    contexts.iter().for_each(|context| string(&mut data, context));
    let answers = ask(stream, option::SET_META_CONTEXT, &data).await?;
    if answers.refusal.is_some() {
        return Ok(Vec::new());
    }
    let mut selected: Vec<(u32, String)> = Vec::new();
    for (kind, data) in &answers.replies {
        let parsed = U32::ref_from_prefix(data).ok().map(|(id, name)| (id.get(), std::str::from_utf8(name)));
        let (option_reply::META_CONTEXT, Some((id, Ok(name)))) = (*kind, parsed) else {
            return violation(Violation::UnexpectedOptionReply);
        };
        let repeated = selected.iter().any(|(other, of)| *other == id || of == name);
        if repeated || !contexts.iter().any(|context| context == name) || selected.len() >= MAX_CONTEXTS {
            return violation(Violation::UnexpectedOptionReply);
        }
        selected.push((id, name.to_owned()));
    }
    Ok(selected)
}

/// Size, flags and block sizes from the replies to GO. Unknown facts are ignored, as the protocol asks.
fn facts(replies: &[(u32, Vec<u8>)]) -> Result<(u64, u16, BlockSize), ClientError> {
    let mut export = None;
    let mut block_size = default_sizes();
    for (kind, data) in replies {
        let Ok((fact, value)) = U16::ref_from_prefix(data) else { return violation(Violation::UnexpectedOptionReply) };
        if *kind != option_reply::INFO {
            return violation(Violation::UnexpectedOptionReply);
        }
        match fact.get() {
            info::EXPORT => match RawExportNameAnswer::ref_from_bytes(value) {
                Ok(raw) => export = Some((raw.size.get(), raw.flags.get())),
                Err(_) => return violation(Violation::UnexpectedOptionReply),
            },
            info::BLOCK_SIZE => match <[U32; 3]>::ref_from_bytes(value) {
                Ok([minimum, preferred, maximum]) => {
                    block_size = checked_sizes(minimum.get(), preferred.get(), maximum.get())?;
                }
                Err(_) => return violation(Violation::UnexpectedOptionReply),
            },
            _ => {}
        }
    }
    let Some((size, flags)) = export else { return violation(Violation::NoSize) };
    Ok((size, flags, block_size))
}

fn default_sizes() -> BlockSize {
    BlockSize { minimum: 1, preferred: 4096, maximum: MAX_PAYLOAD }
}

/// The minimum divides everything we send, so it must be a power of two, and a payload must hold one block.
fn checked_sizes(minimum: u32, preferred: u32, maximum: u32) -> Result<BlockSize, ClientError> {
    let maximum = maximum.min(MAX_PAYLOAD);
    if !minimum.is_power_of_two() || minimum > 64 << 10 || maximum < minimum {
        return violation(Violation::UnexpectedOptionReply);
    }
    Ok(BlockSize { minimum, preferred: preferred.max(minimum), maximum: maximum / minimum * minimum })
}

/// `NBD_OPT_EXPORT_NAME`: a server that does not want to serve the export just closes the connection.
async fn old_form(stream: &Stream, export: &ExportName, no_zeroes: bool) -> Result<(u64, u16), ClientError> {
    send(stream, option::EXPORT_NAME, export.as_str().as_bytes()).await?;
    let mut raw = RawExportNameAnswer::new_zeroed();
    stream.read_exact(raw.as_mut_bytes()).await.map_err(lost)?;
    if !no_zeroes {
        stream.read_exact(&mut [0; EXPORT_NAME_PADDING]).await.map_err(lost)?;
    }
    Ok((raw.size.get(), raw.flags.get()))
}
