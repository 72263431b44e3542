//! A scripted agent, as deaf, talkative and hostile as real ones.

use super::*;
use tempfile::TempDir;
use tokio::net::UnixListener;

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(150);

struct Agent {
    folder: TempDir,
    listener: UnixListener,
}

impl Agent {
    fn new() -> Agent {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let listener = UnixListener::bind(folder.path().join("agent")).expect("a short path");
        Agent { folder, listener }
    }

    /// A synchronised connection; `before` is what an earlier client left unread.
    async fn pair(&self, before: &[u8]) -> (GuestAgent, BufReader<UnixStream>) {
        let path = self.folder.path().join("agent");
        let serving = async {
            let mut stream = BufReader::new(self.listener.accept().await.expect("the client connects").0);
            let request = request(&mut stream).await;
            assert_eq!(request["execute"], "guest-sync-delimited");
            let mut answer = before.to_vec();
            answer.push(DELIMITER);
            answer.extend_from_slice(json!({ "return": request["arguments"]["id"] }).to_string().as_bytes());
            answer.push(b'\n');
            stream.get_mut().write_all(&answer).await.expect("the client reads");
            stream
        };
        let (agent, stream) = tokio::join!(GuestAgent::connect(&path, LONG), serving);
        (agent.expect("the script is correct"), stream)
    }
}

async fn request(stream: &mut BufReader<UnixStream>) -> Value {
    let mut line = String::new();
    stream.read_line(&mut line).await.expect("the client writes text");
    serde_json::from_str(&line).expect("the client writes JSON")
}

#[tokio::test]
async fn leftovers_of_an_earlier_client_are_skipped() {
    for before in [&b""[..], b"{\"return\": {}}\n", b"{\"retu", b"\xff{\"return\": 5}\n", b"\xff\xff"] {
        let agent = Agent::new();
        let (mut client, mut stream) = agent.pair(before).await;
        let serving = async {
            request(&mut stream).await;
            stream.get_mut().write_all(b"{\"return\": {}}\n").await.expect("the client reads");
        };
        let (ping, ()) = tokio::join!(client.ping(LONG), serving);
        ping.unwrap_or_else(|error| panic!("{before:?}: {error}"));
    }
}

#[tokio::test]
async fn nobody_home_is_silence_not_a_hang() {
    let agent = Agent::new();
    let path = agent.folder.path().join("agent");
    let error = GuestAgent::connect(&path, SHORT).await.expect_err("nobody answers");
    assert!(matches!(error, AgentError::Silent { .. }), "{error}");
    let error = GuestAgent::connect(Path::new("/nonexistent/agent"), SHORT).await.expect_err("no socket");
    assert!(matches!(error, AgentError::Socket { .. }), "{error}");
}

#[tokio::test]
async fn after_an_abandoned_command_the_connection_refuses_the_next() {
    let agent = Agent::new();
    let (mut client, _stream) = agent.pair(b"").await;
    let error = client.freeze(SHORT).await.expect_err("nobody answers");
    assert!(matches!(error, AgentError::Silent { .. }), "{error}");
    let error = client.ping(SHORT).await.expect_err("the answer to freeze may still come");
    assert!(matches!(error, AgentError::OutOfStep), "{error}");
}

#[tokio::test]
async fn values_errors_and_nonsense_are_told_apart() {
    let agent = Agent::new();
    let (mut client, mut stream) = agent.pair(b"").await;
    let answers: [&[u8]; 3] =
        [b"{\"return\": 3}\n", b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"busy\"}}\n", b"what\n"];
    let serving = async {
        for answer in answers {
            request(&mut stream).await;
            stream.get_mut().write_all(answer).await.expect("the client reads");
        }
    };
    let asking = async {
        assert_eq!(client.freeze(LONG).await.expect("a number"), 3);
        let error = client.freeze(LONG).await.expect_err("an error");
        assert!(matches!(&error, AgentError::Refused { message, .. } if message == "busy"), "{error}");
        let error = client.thaw(LONG).await.expect_err("nonsense");
        assert!(matches!(error, AgentError::Unexpected { .. }), "{error}");
        assert!(matches!(client.ping(LONG).await.expect_err("out of step"), AgentError::OutOfStep));
    };
    tokio::join!(asking, serving);
}

#[tokio::test]
async fn an_endless_answer_is_cut_off() {
    let agent = Agent::new();
    let (mut client, mut stream) = agent.pair(b"").await;
    let block = vec![b'z'; 1 << 20];
    let serving = async {
        request(&mut stream).await;
        for _ in 0..=(MAX_ANSWER >> 20) {
            // The client hangs up at the limit.
            if stream.get_mut().write_all(&block).await.is_err() {
                return;
            }
        }
    };
    let asking = async move { client.ping(LONG).await };
    let (answer, ()) = tokio::join!(asking, serving);
    assert!(matches!(answer.expect_err("too long"), AgentError::Unexpected { .. }));
}
