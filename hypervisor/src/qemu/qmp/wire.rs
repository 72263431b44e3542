//! The bytes of QMP: one JSON object a line. Pure: no socket, no clock.
//!
//! Reference: QEMU, "QEMU Machine Protocol Specification", sections "Server Greeting", "Issuing Commands" and
//! "Commands Responses". A command carries an `id` and its answer returns it, so answers can be told apart even when a
//! caller stopped waiting; an answer without one belongs to a line QEMU could not parse.

use serde::Deserialize;
use serde_json::{Value, json};

/// The longest line accepted. `query-named-block-nodes` of a large machine has some hundred KiB.
pub const MAX_LINE: usize = 16 * 1024 * 1024;

/// A QEMU release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// An event, with its type where this version knows it.
#[derive(Debug, Clone)]
pub enum Event {
    /// Described by the schema this was built with.
    Known(Box<qapi::qmp::Event>),
    /// Newer than that schema, or of another shape.
    Unknown {
        /// Its name.
        name: String,
        /// Its data; null when it has none.
        data: Value,
    },
}

/// A line from QEMU.
#[derive(Debug)]
pub enum Incoming {
    /// The first line of a connection.
    Greeting(Version),
    /// The answer to the command with this id.
    Reply {
        /// None if QEMU could not read the command.
        id: Option<u64>,
        /// The value, or the error's class and text.
        result: Result<Value, Refusal>,
    },
    /// Something that happened, with the raw object it came from.
    Event {
        /// Typed where possible.
        event: Event,
        /// The name, whether known or not.
        name: String,
        /// The data; null when it has none.
        data: Value,
    },
}

/// QEMU's own error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// `GenericError`, `CommandNotFound`...
    pub class: String,
    /// For people.
    pub message: String,
}

/// Why a line is not QMP.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Not JSON.
    #[error("line is not JSON: {excerpt}")]
    Json {
        /// The first bytes, made printable.
        excerpt: String,
        /// Where it stopped making sense.
        source: serde_json::Error,
    },
    /// JSON, but neither greeting, answer nor event.
    #[error("line is not a QMP message: {excerpt}")]
    Shape {
        /// The first bytes, made printable.
        excerpt: String,
    },
}

#[derive(Deserialize)]
struct RawGreeting {
    version: RawVersion,
}

#[derive(Deserialize)]
struct RawVersion {
    qemu: RawTriple,
}

#[derive(Deserialize)]
struct RawTriple {
    major: u32,
    minor: u32,
    micro: u32,
}

#[derive(Deserialize)]
struct RawError {
    class: String,
    desc: String,
}

/// Reads one line, with or without its line end.
pub fn decode(line: &[u8]) -> Result<Incoming, WireError> {
    let value: Value =
        serde_json::from_slice(line).map_err(|source| WireError::Json { excerpt: excerpt(line), source })?;
    let shape = || WireError::Shape { excerpt: excerpt(line) };
    let Value::Object(mut object) = value else { return Err(shape()) };
    if let Some(greeting) = object.remove("QMP") {
        let greeting: RawGreeting = serde_json::from_value(greeting).map_err(|_| shape())?;
        let RawTriple { major, minor, micro } = greeting.version.qemu;
        return Ok(Incoming::Greeting(Version { major, minor, micro }));
    }
    if let Some(Value::String(name)) = object.get("event") {
        let name = name.clone();
        let data = object.get("data").cloned().unwrap_or(Value::Null);
        let event = match serde_json::from_value::<qapi::qmp::Event>(Value::Object(object)) {
            Ok(event) => Event::Known(Box::new(event)),
            Err(_) => Event::Unknown { name: name.clone(), data: data.clone() },
        };
        return Ok(Incoming::Event { event, name, data });
    }
    let id = object.get("id").and_then(Value::as_u64);
    if let Some(value) = object.remove("return") {
        return Ok(Incoming::Reply { id, result: Ok(value) });
    }
    if let Some(error) = object.remove("error") {
        let error: RawError = serde_json::from_value(error).map_err(|_| shape())?;
        return Ok(Incoming::Reply { id, result: Err(Refusal { class: error.class, message: error.desc }) });
    }
    Err(shape())
}

/// One command as a line. JSON escapes line ends inside strings, so the result holds exactly one.
pub fn encode(id: u64, command: &str, arguments: &Value) -> Vec<u8> {
    let message = match arguments {
        Value::Null => json!({ "execute": command, "id": id }),
        arguments => json!({ "execute": command, "arguments": arguments, "id": id }),
    };
    let mut line = message.to_string().into_bytes();
    line.push(b'\n');
    line
}

fn excerpt(line: &[u8]) -> String {
    String::from_utf8_lossy(line.get(..80).unwrap_or(line)).escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greeting_gives_the_version() {
        let line = br#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "x"}, "capabilities": ["oob"]}}"#;
        match decode(line).expect("a greeting") {
            Incoming::Greeting(version) => assert_eq!(version, Version { major: 10, minor: 0, micro: 2 }),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn answers_keep_their_id_and_errors_their_text() {
        match decode(br#"{"return": {"a": 1}, "id": 7}"#).expect("an answer") {
            Incoming::Reply { id: Some(7), result: Ok(value) } => assert_eq!(value, json!({"a": 1})),
            other => panic!("{other:?}"),
        }
        match decode(br#"{"error": {"class": "GenericError", "desc": "no"}}"#).expect("an error") {
            Incoming::Reply { id: None, result: Err(refusal) } => assert_eq!(refusal.message, "no"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn events_are_known_or_kept_as_they_are() {
        let known = br#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}, "timestamp": {"seconds": 1, "microseconds": 2}}"#;
        assert!(matches!(decode(known).expect("an event"), Incoming::Event { event: Event::Known(_), .. }));
        let newer = br#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "a-new-reason"}, "timestamp": {"seconds": 1, "microseconds": 2}}"#;
        assert!(matches!(decode(newer).expect("an event"), Incoming::Event { event: Event::Unknown { .. }, .. }));
        match decode(br#"{"event": "MOON_LANDING", "data": {"feet": 2}}"#).expect("an event") {
            Incoming::Event { event: Event::Unknown { name, data }, .. } => {
                assert_eq!((name.as_str(), data), ("MOON_LANDING", json!({"feet": 2})));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for line in [&b"hello"[..], b"", b"[]", b"{}", b"17", b"{\"error\": 3}", b"{\"QMP\": {}}", b"\xff\xfe"] {
            assert!(decode(line).is_err(), "{line:?}");
        }
    }

    #[test]
    fn a_command_is_one_line_whatever_its_arguments_hold() {
        let line = encode(3, "x", &json!({"path": "a\nb\u{2028}\"c"}));
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        assert_eq!(encode(1, "stop", &Value::Null), b"{\"execute\":\"stop\",\"id\":1}\n");
    }
}
