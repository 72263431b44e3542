//! Random bytes and damaged conversations: whatever comes, the server goes on serving others.

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::Arc;

use common::{OPTION, Running, Style, contexts, go, name};
use nbd_server::{Client, ClientOptions, Export, ExportTable, Limits, Listen, MemoryExport, NbdUri, Server};
use proptest::prelude::*;

/// A good conversation from the client's first byte to its last.
fn conversation() -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    let mut option = |kind: u32, data: &[u8]| {
        bytes.extend(OPTION);
        bytes.extend(kind.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).expect("short").to_be_bytes());
        bytes.extend(data);
    };
    option(8, &[]);
    option(3, &[]);
    option(10, &contexts("disk", &["base:allocation"]));
    option(6, &go("disk", &[0, 1, 2, 3]));
    option(7, &go("disk", &[3]));
    for (command, payload) in [(0_u16, 0), (1, 300), (7, 0), (6, 0), (3, 0), (4, 0), (5, 0), (0, 0)] {
        bytes.extend(0x2560_9513_u32.to_be_bytes());
        bytes.extend([0, 0]);
        bytes.extend(command.to_be_bytes());
        bytes.extend(u64::from(command).to_be_bytes());
        bytes.extend(1000_u64.to_be_bytes());
        bytes.extend(300_u32.to_be_bytes());
        bytes.extend(vec![7; payload]);
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_conversations_end_and_leave_the_server_serving(
        damages in prop::collection::vec(prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), 40),
        noise in prop::collection::vec(any::<u8>(), 0..2000),
    ) {
        let server = Running::start(Arc::new(MemoryExport::from_bytes(&vec![5; 1 << 20])) as Arc<dyn Export>);
        let talk = |bytes: &[u8]| {
            let mut raw = server.connect();
            let _ = raw.socket.write_all(bytes); // the server may have heard enough
            let _ = raw.socket.shutdown(Shutdown::Write);
            let mut answer = Vec::new();
            if let Err(error) = raw.socket.read_to_end(&mut answer) {
                assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "the connection does not end");
            }
            answer.len()
        };
        let good = conversation();
        prop_assert!(talk(&good) > 1000);
        for damage in damages {
            let mut bytes = good.clone();
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            talk(&bytes);
        }
        talk(&noise);
        prop_assert_eq!(server.open(Style::Structured).read(0, 0, 16).map(|data| data.len()), Ok(16));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_serves_on_a_free_port_and_the_uri_leads_there() {
    let table = Arc::new(ExportTable::new());
    let disk = name("a disk/with ?");
    table.add(disk.clone(), Arc::new(MemoryExport::from_bytes(&[5; 70_000]))).expect("free");
    let server = Server::new(Arc::clone(&table), Limits::default());
    let listener = server.bind(&"tcp:127.0.0.1:0".parse().expect("an address")).await.expect("a free port");
    assert!(matches!(listener.local(), Listen::Tcp(address) if address.port() != 0));
    let uri: NbdUri = listener.uri(&disk).parse().expect("we read what we write");
    assert_eq!(uri.export, disk);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(listener.serve(stopped));
    let client = Client::connect(&uri, &ClientOptions::default()).await.expect("it listens");
    let mut data = vec![0; 70_000];
    client.read(0, &mut data).await.expect("in range");
    assert!(data.iter().all(|&byte| byte == 5));
    stop.send(()).expect("it serves");
    serving.await.expect("no panic");
    assert!(client.read(0, &mut data).await.is_err());
    assert_eq!(table.connections(&disk), Some(0));
}
