//! [`NbdUri`]: `nbd://HOST[:PORT]/NAME` and `nbd+unix:///NAME?socket=PATH`, and the same with `nbds` for TLS, read and
//! written.

use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::name::{ExportName, NameError};
use crate::wire::DEFAULT_PORT;

/// Where an export is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdUri {
    /// How to reach the server.
    pub endpoint: Endpoint,
    /// The export on it.
    pub export: ExportName,
    /// Set if TLS is asked for.
    pub tls: Option<UriTls>,
}

/// What a URI says about TLS, as libnbd has it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UriTls {
    /// `tls-certificates`: the folder with the certificates.
    pub certificates: Option<PathBuf>,
    /// `tls-hostname`: the name that the server's certificate must be for, instead of the one in the URI.
    pub hostname: Option<String>,
}

/// How to reach a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// TCP.
    Tcp {
        /// Host name or address, IPv6 without brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// Unix domain socket.
    Unix(PathBuf),
}

/// Why a string is not an NBD URI that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// Another scheme.
    #[error("'{0}' is not an NBD URI: it starts with none of nbd://, nbds://, nbd+unix:// and nbds+unix://")]
    Scheme(String),
    /// A TCP URI without a host.
    #[error("'{0}' names no host")]
    NoHost(String),
    /// The port is not a number up to 65535.
    #[error("'{0}' has a bad port")]
    Port(String),
    /// A Unix URI without `?socket=`.
    #[error("'{0}' names no socket (?socket=PATH)")]
    NoSocket(String),
    /// A per cent sign without two hexadecimal digits, or bytes that are not UTF-8.
    #[error("'{0}' has a bad escape")]
    Escape(String),
    /// The name of the export is not one.
    #[error(transparent)]
    Name(#[from] NameError),
}

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<NbdUri, UriError> {
        let (scheme, rest) = text.split_once("://").ok_or_else(|| UriError::Scheme(text.to_owned()))?;
        let rest = rest.split_once('#').map_or(rest, |(before, _)| before);
        let (before_query, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, name) = before_query.split_once('/').unwrap_or((before_query, ""));
        let export = ExportName::new(decode(name).ok_or_else(|| UriError::Escape(text.to_owned()))?)?;
        let endpoint = match scheme {
            "nbd" | "nbds" => tcp(text, authority)?,
            "nbd+unix" | "nbds+unix" => unix(text, query)?,
            _ => return Err(UriError::Scheme(text.to_owned())),
        };
        let tls = if scheme.starts_with("nbds") { Some(tls(text, query)?) } else { None };
        Ok(NbdUri { endpoint, export, tls })
    }
}

fn tcp(text: &str, authority: &str) -> Result<Endpoint, UriError> {
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let (host, port) = if let Some(bracketed) = authority.strip_prefix('[') {
        let (host, after) = bracketed.split_once(']').ok_or_else(|| UriError::NoHost(text.to_owned()))?;
        (host, after.strip_prefix(':'))
    } else {
        authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port)))
    };
    let port = match port {
        None | Some("") => DEFAULT_PORT,
        Some(port) => port.parse().map_err(|_| UriError::Port(text.to_owned()))?,
    };
    let host = decode(host).ok_or_else(|| UriError::Escape(text.to_owned()))?;
    if host.is_empty() {
        return Err(UriError::NoHost(text.to_owned()));
    }
    Ok(Endpoint::Tcp { host, port })
}

fn unix(text: &str, query: &str) -> Result<Endpoint, UriError> {
    let socket = parameter(text, query, "socket=")?.ok_or_else(|| UriError::NoSocket(text.to_owned()))?;
    Ok(Endpoint::Unix(PathBuf::from(socket)))
}

fn tls(text: &str, query: &str) -> Result<UriTls, UriError> {
    Ok(UriTls {
        certificates: parameter(text, query, "tls-certificates=")?.map(PathBuf::from),
        hostname: parameter(text, query, "tls-hostname=")?,
    })
}

/// A parameter of the query that is there and not empty; `key` ends with an equals sign.
fn parameter(text: &str, query: &str, key: &str) -> Result<Option<String>, UriError> {
    let value = query.split('&').find_map(|pair| pair.strip_prefix(key)).filter(|value| !value.is_empty());
    value.map(|value| decode(value).ok_or_else(|| UriError::Escape(text.to_owned()))).transpose()
}

impl NbdUri {
    /// For a Unix socket.
    pub fn unix(socket: &Path, export: &ExportName) -> NbdUri {
        NbdUri { endpoint: Endpoint::Unix(socket.to_owned()), export: export.clone(), tls: None }
    }

    /// For TCP.
    pub fn tcp(host: impl Into<String>, port: u16, export: &ExportName) -> NbdUri {
        NbdUri { endpoint: Endpoint::Tcp { host: host.into(), port }, export: export.clone(), tls: None }
    }

    /// The same with TLS.
    pub fn with_tls(self, tls: UriTls) -> NbdUri {
        NbdUri { tls: Some(tls), ..self }
    }
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = '?';
        match &self.endpoint {
            Endpoint::Tcp { host, port } => {
                f.write_str(if self.tls.is_some() { "nbds://" } else { "nbd://" })?;
                let (open, close) = if host.contains(':') { ("[", "]") } else { ("", "") };
                f.write_str(open)?;
                escape(f, host.as_bytes(), HOST_SAFE)?;
                write!(f, "{close}:{port}/")?;
                encode(f, self.export.as_str().as_bytes())?;
            }
            Endpoint::Unix(path) => {
                f.write_str(if self.tls.is_some() { "nbds+unix:///" } else { "nbd+unix:///" })?;
                encode(f, self.export.as_str().as_bytes())?;
                f.write_str("?socket=")?;
                encode(f, path.as_os_str().as_encoded_bytes())?;
                separator = '&';
            }
        }
        let tls = self.tls.as_ref();
        let certificates =
            tls.and_then(|tls| tls.certificates.as_ref()).map(|path| path.as_os_str().as_encoded_bytes());
        let hostname = tls.and_then(|tls| tls.hostname.as_ref()).map(|name| name.as_bytes());
        for (key, value) in [("tls-certificates", certificates), ("tls-hostname", hostname)] {
            if let Some(value) = value {
                write!(f, "{separator}{key}=")?;
                encode(f, value)?;
                separator = '&';
            }
        }
        Ok(())
    }
}

/// Besides letters and digits, what may stand unescaped both in a path and in a query, by RFC 3986.
const SAFE: &[u8] = b"-._~/:@";
/// The same for a host; colons stand between brackets.
const HOST_SAFE: &[u8] = b"-._~:";

fn encode(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    escape(f, bytes, SAFE)
}

fn escape(f: &mut fmt::Formatter<'_>, bytes: &[u8], safe: &[u8]) -> fmt::Result {
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || safe.contains(&byte) {
            f.write_char(char::from(byte))?;
        } else {
            write!(f, "%{byte:02X}")?;
        }
    }
    Ok(())
}

fn decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let high = char::from(bytes.next()?).to_digit(16)?;
        let low = char::from(bytes.next()?).to_digit(16)?;
        out.push(u8::try_from(high * 16 + low).ok()?);
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_round_trip() {
        for text in [
            "nbd://127.0.0.1:10809/",
            "nbd://example.org:1234/web01/disk0",
            "nbd://[::1]:1234/a%20b%3F",
            "nbd+unix:///disk0?socket=/run/life%20boat/x.sock",
            "nbd+unix:///?socket=/tmp/s",
            "nbds://h:1/x",
            "nbds://h:1/x?tls-certificates=/etc/pki/a%20b&tls-hostname=other",
            "nbds+unix:///x?socket=/tmp/s&tls-certificates=/p",
            "nbd://a%40b%2F%5D:1/",
            "nbd://[%40::1]:1/",
        ] {
            let uri: NbdUri = text.parse().expect(text);
            assert_eq!(uri.to_string(), text);
        }
    }

    #[test]
    fn what_is_left_out_has_defaults() {
        let uri: NbdUri = "nbd://host".parse().expect("short form");
        assert_eq!(uri, NbdUri::tcp("host", DEFAULT_PORT, &ExportName::default()));
        let uri: NbdUri = "nbd+unix:///x?tls=no&socket=a%2Fb".parse().expect("relative socket");
        assert_eq!(uri.endpoint, Endpoint::Unix("a/b".into()));
        assert_eq!(uri.export.as_str(), "x");
    }

    #[test]
    fn bad_uris_are_refused_by_reason() {
        let error = |text: &str| text.parse::<NbdUri>().expect_err(text);
        assert!(matches!(error("http://x/"), UriError::Scheme(_)));
        assert!(matches!(error("disk.raw"), UriError::Scheme(_)));
        assert!(matches!(error("nbdss://x/"), UriError::Scheme(_)));
        assert!(matches!(error("nbds://h/x?tls-hostname=%zz"), UriError::Escape(_)));
        assert!(matches!(error("nbd:///x"), UriError::NoHost(_)));
        assert!(matches!(error("nbd://h:99999/x"), UriError::Port(_)));
        assert!(matches!(error("nbd+unix:///x"), UriError::NoSocket(_)));
        assert!(matches!(error("nbd://h/%zz"), UriError::Escape(_)));
        assert!(matches!(error("nbd://h/%00"), UriError::Name(NameError::Nul)));
        assert!(matches!(error("nbd://h/%ff"), UriError::Escape(_)));
    }
}
