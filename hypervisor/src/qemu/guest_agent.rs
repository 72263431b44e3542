//! The guest agent: commands to a program inside the guest.
//!
//! Its protocol is QMP's without greeting, ids and events, over a channel that keeps what an earlier client left
//! unread. So a connection starts with `guest-sync-delimited`: the answer that carries our random number after a 0xFF
//! byte is the first that is ours. One command runs at a time; after a deadline passed or a future was dropped the
//! connection is out of step and says so instead of giving the wrong answer.
//!
//! The guest is hostile: answers are bounded.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// The longest answer accepted: file contents and command output come in one line.
pub const MAX_ANSWER: usize = 32 * 1024 * 1024;
const DELIMITER: u8 = 0xff;

/// A connection to the agent inside a guest.
#[derive(Debug)]
pub struct GuestAgent {
    stream: BufReader<UnixStream>,
    /// False from the moment a command is sent until its answer is read.
    in_step: bool,
}

/// Why the agent did not do it.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The machine's channel cannot be reached.
    #[error("cannot connect to guest agent socket {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nobody answers: no agent installed, not started yet, or the guest hangs.
    #[error("the guest agent does not answer within {waited:?}")]
    Silent {
        /// The deadline.
        waited: Duration,
    },
    /// The agent said no.
    #[error("guest agent: {command}: {message}")]
    Refused {
        /// The command.
        command: String,
        /// `GenericError`, `CommandNotFound`...
        class: String,
        /// For people.
        message: String,
    },
    /// The connection broke.
    #[error("guest agent: {command}: the connection ended")]
    Ended {
        /// The command.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// Not what an agent answers.
    #[error("guest agent: {command}: the answer has an unexpected form")]
    Unexpected {
        /// The command.
        command: String,
    },
    /// This machine has no channel to an agent.
    #[error("the machine has no guest agent channel")]
    Absent,
    /// Whoever has the channel did not pass the command on, or got no answer.
    #[error("the guest agent cannot be asked")]
    Machine(#[source] Box<crate::machine::MachineError>),
    /// An earlier command was given up; connect again.
    #[error("guest agent: an earlier command was abandoned, connect again")]
    OutOfStep,
}

impl GuestAgent {
    /// Connects and synchronises. Returns only once an agent has answered.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<GuestAgent, AgentError> {
        let connecting = async {
            let stream = UnixStream::connect(path)
                .await
                .map_err(|source| AgentError::Socket { path: path.to_owned(), source })?;
            let mut agent = GuestAgent { stream: BufReader::new(stream), in_step: false };
            agent.synchronise().await?;
            Ok(agent)
        };
        tokio::time::timeout(deadline, connecting).await.unwrap_or(Err(AgentError::Silent { waited: deadline }))
    }

    /// Runs a typed command.
    pub async fn execute<C: qapi::Command>(&mut self, command: &C, deadline: Duration) -> Result<C::Ok, AgentError> {
        let unexpected = |_| AgentError::Unexpected { command: C::NAME.to_owned() };
        let arguments = serde_json::to_value(command).map_err(unexpected)?;
        let answer = self.call(C::NAME, arguments, deadline).await?;
        serde_json::from_value(answer).map_err(unexpected)
    }

    /// Runs any command.
    pub async fn call(&mut self, command: &str, arguments: Value, deadline: Duration) -> Result<Value, AgentError> {
        if !self.in_step {
            return Err(AgentError::OutOfStep);
        }
        let asking = async {
            self.send(command, &arguments).await?;
            loop {
                let line = self.line(command).await?;
                if !line.trim_ascii().is_empty() {
                    return self.answer(command, &line);
                }
            }
        };
        tokio::time::timeout(deadline, asking).await.unwrap_or(Err(AgentError::Silent { waited: deadline }))
    }

    /// Whether the agent answers.
    pub async fn ping(&mut self, deadline: Duration) -> Result<(), AgentError> {
        self.call("guest-ping", Value::Null, deadline).await.map(drop)
    }

    /// Freezes the guest's file systems and returns how many. Thaw them whatever happens next.
    pub async fn freeze(&mut self, deadline: Duration) -> Result<u64, AgentError> {
        let answer = self.call("guest-fsfreeze-freeze", Value::Null, deadline).await?;
        answer.as_u64().ok_or_else(|| AgentError::Unexpected { command: "guest-fsfreeze-freeze".to_owned() })
    }

    /// Thaws them and returns how many.
    pub async fn thaw(&mut self, deadline: Duration) -> Result<u64, AgentError> {
        let answer = self.call("guest-fsfreeze-thaw", Value::Null, deadline).await?;
        answer.as_u64().ok_or_else(|| AgentError::Unexpected { command: "guest-fsfreeze-thaw".to_owned() })
    }

    async fn synchronise(&mut self) -> Result<(), AgentError> {
        const COMMAND: &str = "guest-sync-delimited";
        // Distinct from a client's before us is all that is asked of it.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = u64::from(now.subsec_nanos()) << 20 | now.as_secs() & 0xf_ffff;
        self.send(COMMAND, &json!({ "id": id })).await?;
        loop {
            let line = self.line(COMMAND).await?;
            // Whatever an earlier client left stands before the delimiter, on this line or on lines of its own.
            let Some(at) = line.iter().rposition(|byte| *byte == DELIMITER) else { continue };
            let answer = line.get(at + 1..).unwrap_or_default();
            if let Ok(value) = serde_json::from_slice::<Value>(answer)
                && value.get("return").and_then(Value::as_u64) == Some(id)
            {
                self.in_step = true;
                return Ok(());
            }
        }
    }

    async fn send(&mut self, command: &str, arguments: &Value) -> Result<(), AgentError> {
        self.in_step = false;
        let message = match arguments {
            Value::Null => json!({ "execute": command }),
            arguments => json!({ "execute": command, "arguments": arguments }),
        };
        let ended = |source| AgentError::Ended { command: command.to_owned(), source };
        let line = format!("{message}\n");
        self.stream.get_mut().write_all(line.as_bytes()).await.map_err(ended)
    }

    fn answer(&mut self, command: &str, line: &[u8]) -> Result<Value, AgentError> {
        let unexpected = || AgentError::Unexpected { command: command.to_owned() };
        let Ok(Value::Object(mut object)) = serde_json::from_slice::<Value>(line) else { return Err(unexpected()) };
        self.in_step = true;
        if let Some(value) = object.remove("return") {
            return Ok(value);
        }
        let error = object.remove("error").ok_or_else(unexpected)?;
        let text = |key| error.get(key).and_then(Value::as_str).map(str::to_owned).unwrap_or_default();
        Err(AgentError::Refused { command: command.to_owned(), class: text("class"), message: text("desc") })
    }

    async fn line(&mut self, command: &str) -> Result<Vec<u8>, AgentError> {
        let ended = |source| AgentError::Ended { command: command.to_owned(), source };
        let mut line = Vec::new();
        loop {
            let available = self.stream.fill_buf().await.map_err(ended)?;
            if available.is_empty() {
                return Err(ended(io::ErrorKind::UnexpectedEof.into()));
            }
            let (taken, complete) = match available.iter().position(|byte| *byte == b'\n') {
                Some(end) => (end + 1, true),
                None => (available.len(), false),
            };
            if line.len() + taken > MAX_ANSWER {
                return Err(AgentError::Unexpected { command: command.to_owned() });
            }
            line.extend_from_slice(available.get(..taken).unwrap_or_default());
            self.stream.consume(taken);
            if complete {
                return Ok(line);
            }
        }
    }
}

#[cfg(test)]
mod tests;
