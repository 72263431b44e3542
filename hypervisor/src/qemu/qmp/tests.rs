//! A scripted server on a Unix socket: slow, garbled, closing half way, answering out of order.

use super::*;
use serde_json::json;
use tempfile::TempDir;
use tokio::net::UnixListener;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}}, "capabilities": []}}"#;
const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(150);

/// The server's side of one connection.
struct Peer {
    lines: BufReader<UnixStream>,
}

impl Peer {
    /// The next command's id and name.
    async fn command(&mut self) -> (u64, String) {
        let mut line = String::new();
        self.lines.read_line(&mut line).await.expect("the client writes text");
        let value: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
        let id = value["id"].as_u64().expect("every command has an id");
        (id, value["execute"].as_str().expect("every command has a name").to_owned())
    }

    async fn send(&mut self, text: &str) {
        self.lines.get_mut().write_all(text.as_bytes()).await.expect("the client reads");
    }

    async fn answer(&mut self, id: u64, value: Value) {
        self.send(&format!("{}\r\n", json!({ "return": value, "id": id }))).await;
    }

    async fn negotiate(&mut self) {
        self.send(&format!("{GREETING}\r\n")).await;
        let (id, name) = self.command().await;
        assert_eq!(name, "qmp_capabilities");
        self.answer(id, json!({})).await;
    }
}

struct Server {
    folder: TempDir,
    listener: UnixListener,
}

impl Server {
    fn new() -> Server {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let listener = UnixListener::bind(folder.path().join("qmp")).expect("a short path");
        Server { folder, listener }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    async fn accept(&self) -> Peer {
        Peer { lines: BufReader::new(self.listener.accept().await.expect("the client connects").0) }
    }

    /// Both ends after the negotiation.
    async fn pair(&self) -> (Client, Peer) {
        let path = self.path();
        let serving = async {
            let mut peer = self.accept().await;
            peer.negotiate().await;
            peer
        };
        let (client, peer) = tokio::join!(Client::connect(&path, LONG), serving);
        (client.expect("the script is correct"), peer)
    }
}

#[tokio::test]
async fn the_negotiation_gives_version_and_process() {
    let server = Server::new();
    let (client, _peer) = server.pair().await;
    assert_eq!(client.version(), Version { major: 7, minor: 2, micro: 0 });
    assert_eq!(client.peer_pid(), i32::try_from(std::process::id()).ok());
}

#[tokio::test]
async fn answers_out_of_order_reach_their_commands() {
    let server = Server::new();
    let (client, mut peer) = server.pair().await;
    let serving = async {
        let (first, first_name) = peer.command().await;
        let (second, second_name) = peer.command().await;
        peer.answer(second, json!(second_name)).await;
        peer.send("{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 1}}\n").await;
        peer.answer(first, json!(first_name)).await;
    };
    let (one, two, ()) =
        tokio::join!(client.call("query-one", Value::Null, LONG), client.call("query-two", Value::Null, LONG), serving);
    assert_eq!(one.expect("answered"), json!("query-one"));
    assert_eq!(two.expect("answered"), json!("query-two"));
}

#[tokio::test]
async fn a_late_answer_is_dropped_and_the_next_command_gets_its_own() {
    let server = Server::new();
    let (client, mut peer) = server.pair().await;
    let error = client.call("slow", Value::Null, SHORT).await.expect_err("nobody answers");
    assert!(matches!(error, CommandError::TimedOut { .. }), "{error}");
    let (slow, _) = peer.command().await;
    let serving = async {
        let (id, _) = peer.command().await;
        peer.answer(slow, json!("late")).await;
        peer.answer(id, json!("mine")).await;
    };
    let (answer, ()) = tokio::join!(client.call("next", Value::Null, LONG), serving);
    assert_eq!(answer.expect("answered"), json!("mine"));
    assert!(client.shared.waiting.lock().expect("nobody panicked").slots.is_empty());
}

#[tokio::test]
async fn a_dropped_future_leaves_nothing_behind() {
    let server = Server::new();
    let (client, mut peer) = server.pair().await;
    for _ in 0..50 {
        let call = client.call("forgotten", Value::Null, LONG);
        assert!(tokio::time::timeout(Duration::from_millis(1), call).await.is_err());
    }
    assert!(client.shared.waiting.lock().expect("nobody panicked").slots.is_empty());
    let serving = async {
        loop {
            let (id, name) = peer.command().await;
            // Every line arrived whole, or this would not be a command.
            peer.answer(id, json!(name)).await;
            if name == "kept" {
                return;
            }
        }
    };
    let (answer, ()) = tokio::join!(client.call("kept", Value::Null, LONG), serving);
    assert_eq!(answer.expect("answered"), json!("kept"));
}

#[tokio::test]
async fn a_server_that_does_not_read_cannot_hold_a_command_beyond_its_deadline() {
    let server = Server::new();
    let (client, _peer) = server.pair().await;
    let filler = json!({ "text": "x".repeat(1 << 20) });
    for _ in 0..4 {
        let error = client.call("fill", filler.clone(), SHORT).await.expect_err("the socket is full");
        assert!(matches!(error, CommandError::TimedOut { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_connection_closed_half_way_tells_every_waiting_command() {
    let server = Server::new();
    let (client, mut peer) = server.pair().await;
    let serving = async move {
        let (id, _) = peer.command().await;
        peer.command().await;
        peer.send(&format!("{{\"return\": {{}}, \"id\": {id}")).await;
    };
    let (one, two, ()) =
        tokio::join!(client.call("one", Value::Null, LONG), client.call("two", Value::Null, LONG), serving);
    for result in [one, two] {
        let error = result.expect_err("the server went away");
        assert!(error.to_string().contains("in the middle of a line"), "{error}");
    }
    client.closed().await;
    assert!(client.is_closed());
    let error = client.call("three", Value::Null, LONG).await.expect_err("it stays closed");
    assert!(matches!(error, CommandError::Closed { .. }), "{error}");
}

#[tokio::test]
async fn garbage_ends_the_connection_with_a_reason() {
    let server = Server::new();
    let (client, mut peer) = server.pair().await;
    let serving = async {
        peer.command().await;
        peer.send("Segmentation fault\n").await;
    };
    let (answer, ()) = tokio::join!(client.call("one", Value::Null, LONG), serving);
    assert!(answer.expect_err("garbage").to_string().contains("Segmentation fault"));
}

#[tokio::test]
async fn a_line_without_end_is_cut_off() {
    let server = Server::new();
    let (client, mut peer) = server.pair().await;
    let block = "y".repeat(1 << 20);
    let serving = async {
        // The client hangs up at the limit; later writes may then fail.
        for _ in 0..=(MAX_LINE >> 20) {
            if peer.lines.get_mut().write_all(block.as_bytes()).await.is_err() {
                break;
            }
        }
    };
    let (reason, ()) = tokio::join!(client.closed(), serving);
    assert!(reason.contains("line longer"), "{reason}");
}

#[tokio::test]
async fn known_unknown_and_misshapen_events_arrive_in_order() {
    let server = Server::new();
    let (client, mut peer) = server.pair().await;
    let mut events = client.events_from_start();
    peer.send("{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 1}}\n").await;
    peer.send("\n{\"event\": \"FLUX\", \"data\": {\"level\": 3}}\n").await;
    peer.send("{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, \"reason\": \"unheard-of\"}}\n").await;
    let next = events.recv().await.expect("sent");
    assert!(matches!(next.event, Event::Known(_)));
    let next = events.recv().await.expect("sent");
    assert_eq!((next.name.as_str(), next.data), ("FLUX", json!({"level": 3})));
    assert_eq!(events.recv().await.expect("sent").name, "SHUTDOWN");
    assert_eq!(client.shutdown_notice(), Some((true, "unheard-of".to_owned())));
}

#[tokio::test]
async fn errors_and_misshapen_answers_are_told_apart() {
    let server = Server::new();
    let (client, mut peer) = server.pair().await;
    let serving = async {
        let (id, _) = peer.command().await;
        peer.send(&format!("{{\"error\": {{\"class\": \"CommandNotFound\", \"desc\": \"what?\"}}, \"id\": {id}}}\n"))
            .await;
        let (id, _) = peer.command().await;
        peer.answer(id, json!("not a status")).await;
    };
    let asking = async {
        let refused = client.call("nonsense", Value::Null, LONG).await.expect_err("refused");
        assert!(matches!(&refused, CommandError::Refused { class, .. } if class == "CommandNotFound"), "{refused}");
        let typed = client.execute(&qapi::qmp::query_status {}, LONG).await.expect_err("a string is no status");
        assert!(matches!(typed, CommandError::Unexpected { .. }), "{typed}");
    };
    tokio::join!(asking, serving);
}

#[tokio::test]
async fn connecting_fails_clearly() {
    let server = Server::new();
    let missing = Client::connect(&server.folder.path().join("none"), LONG).await.expect_err("no socket");
    assert!(matches!(missing, ConnectError::Socket { .. }), "{missing}");
    // Nobody accepts: as when another client holds the monitor.
    let silent = Client::connect(&server.path(), SHORT).await.expect_err("no greeting");
    assert!(matches!(silent, ConnectError::NoGreeting { .. }), "{silent}");
    drop(server.accept().await);

    let path = server.path();
    let serving = async {
        let mut peer = server.accept().await;
        peer.send("{\"event\": \"STOP\"}\n").await;
    };
    let (result, ()) = tokio::join!(Client::connect(&path, LONG), serving);
    assert!(matches!(result.expect_err("not a greeting"), ConnectError::NotQmp));
    let (result, _) = tokio::join!(Client::connect(&path, LONG), async { drop(server.accept().await) });
    assert!(matches!(result.expect_err("closed at once"), ConnectError::Ended { .. }));
    let serving = async {
        let mut peer = server.accept().await;
        peer.send(&format!("{GREETING}\n")).await;
        let (id, _) = peer.command().await;
        peer.send(&format!("{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"no\"}}, \"id\": {id}}}\n")).await;
    };
    let (result, ()) = tokio::join!(Client::connect(&path, LONG), serving);
    assert!(matches!(result.expect_err("refused"), ConnectError::Negotiation { .. }));
}
