//! Random operations through several clients at once against a plain array, by every way to connect and with every form
//! of headers: each client owns a part of the disk, so that the outcome does not depend on the order between clients.

mod common;

use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use common::{Running, name};
use nbd_server::export::{ExtentKind, ZeroMode};
use nbd_server::tls::pki;
use nbd_server::{
    BlockingClient, Client, ClientCertificates, ClientOptions, Export, ExportTable, HeaderStyle, Limits, Listen,
    MemoryExport, NbdUri, Server, TlsServer, UriTls,
};
use proptest::prelude::*;

const PART: u64 = 1 << 20;
const PARTS: u64 = 4;

#[derive(Debug, Clone)]
enum Step {
    Read(u64, u64),
    Write(u64, u64, u8),
    WriteDurable(u64, u64, u8),
    Zero(u64, u64, bool),
    Trim(u64, u64),
    Status(u64, u64),
    Flush,
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    prop_oneof![
        (0..PART, 0..4096_u64),
        (0..PART, 0..PART),
        (0..PART >> 12, 1..32_u64).prop_map(|(page, pages)| (page << 12, pages << 12)),
    ]
    .prop_map(|(offset, length)| (offset, length.min(PART - offset)))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => range().prop_map(|(o, l)| Step::Read(o, l)),
        3 => (range(), any::<u8>()).prop_map(|((o, l), byte)| Step::Write(o, l, byte)),
        1 => (range(), any::<u8>()).prop_map(|((o, l), byte)| Step::WriteDurable(o, l, byte)),
        1 => (range(), any::<bool>()).prop_map(|((o, l), keep)| Step::Zero(o, l, keep)),
        1 => range().prop_map(|(o, l)| Step::Trim(o, l)),
        1 => range().prop_map(|(o, l)| Step::Status(o, l)),
        1 => Just(Step::Flush),
    ]
}

/// How the clients of a case reach their server.
#[derive(Debug, Clone, Copy)]
struct Way {
    tcp: bool,
    tls: bool,
    headers: HeaderStyle,
    /// Reads are answered from memory.
    resident: bool,
}

fn way() -> impl Strategy<Value = Way> {
    let headers = prop_oneof![
        3 => Just(HeaderStyle::Extended),
        2 => Just(HeaderStyle::Structured),
        1 => Just(HeaderStyle::Simple),
    ];
    (any::<bool>(), any::<bool>(), headers, any::<bool>()).prop_map(|(tcp, tls, headers, resident)| Way {
        tcp,
        tls,
        headers,
        resident,
    })
}

static CERTIFICATES: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    pki::create(folder.path()).expect("an authority");
    let host = pki::add_host(folder.path(), &["localhost"]).expect("a host");
    (folder, host)
});

impl Way {
    fn serve(self, disk: Arc<dyn Export>) -> (Running, NbdUri) {
        let table = Arc::new(ExportTable::new());
        table.add(name("disk"), disk).expect("an empty table");
        let listen: Option<Listen> = self.tcp.then(|| "tcp:127.0.0.1:0".parse().expect("an address"));
        let server = Running::launch(table, listen, move |table| {
            let server = Server::new(table, Limits::default());
            if !self.tls {
                return server;
            }
            let tls = TlsServer::from_folder(&CERTIFICATES.1, ClientCertificates::Required);
            server.with_tls(tls.expect("good certificates"))
        });
        let uri = match &server.local {
            Listen::Tcp(address) => NbdUri::tcp("localhost", address.port(), &name("disk")),
            Listen::Unix(_) => server.uri(),
        };
        let tls = UriTls { certificates: Some(CERTIFICATES.1.clone()), hostname: None };
        (server, if self.tls { uri.with_tls(tls) } else { uri })
    }
}

fn place(offset: u64, length: u64) -> std::ops::Range<usize> {
    let at = |value: u64| usize::try_from(value).expect("a small disk");
    at(offset)..at(offset + length)
}

async fn play(client: Client, base: u64, steps: Vec<Step>, model: &mut [u8]) {
    for step in steps {
        match step.clone() {
            Step::Read(offset, length) => {
                let mut data = vec![0xee; place(0, length).len()];
                client.read(base + offset, &mut data).await.expect("in range");
                assert!(data == model[place(offset, length)], "{step:?}");
            }
            Step::Write(offset, length, byte) => {
                model[place(offset, length)].fill(byte);
                client.write(base + offset, &model[place(offset, length)]).await.expect("in range");
            }
            Step::WriteDurable(offset, length, byte) => {
                model[place(offset, length)].fill(byte);
                client.write_durable(base + offset, &model[place(offset, length)]).await.expect("in range");
            }
            Step::Zero(offset, length, keep) => {
                model[place(offset, length)].fill(0);
                let mode = if keep { ZeroMode::KeepAllocated } else { ZeroMode::MayPunch };
                client.write_zeroes(base + offset, length, mode).await.expect("in range");
            }
            Step::Trim(offset, length) => {
                model[place(offset, length)].fill(0); // a MemoryExport zeroes what is trimmed
                client.trim(base + offset, length).await.expect("in range");
            }
            Step::Status(offset, length) => {
                let mut at = offset;
                while at < offset + length {
                    let extents = client.block_status(base + at, offset + length - at).await.expect("in range");
                    assert!(!extents.is_empty());
                    for extent in extents {
                        let zero = model[place(at, extent.length)].iter().all(|&byte| byte == 0);
                        assert!(extent.kind == ExtentKind::Data || zero, "{step:?}: data in a hole");
                        at += extent.length;
                    }
                }
            }
            Step::Flush => client.flush().await.expect("no failure"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn several_connections_agree_with_a_model(
        steps in prop::collection::vec(prop::collection::vec(step(), 1..60), usize::try_from(PARTS).expect("few")),
        way in way(),
    ) {
        let disk = MemoryExport::new(PART * PARTS);
        let disk = Arc::new(if way.resident { disk } else { disk.not_resident() });
        let (_server, uri) = way.serve(Arc::clone(&disk) as Arc<dyn Export>);
        let options = ClientOptions { headers: way.headers, ..ClientOptions::default() };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let model = runtime.expect("a runtime").block_on(async {
            let mut players = Vec::new();
            for (number, steps) in (0..).zip(steps) {
                let client = Client::connect(&uri, &options).await.expect("it listens");
                players.push(tokio::spawn(async move {
                    let mut model = vec![0; place(0, PART).len()];
                    play(client.clone(), number * PART, steps, &mut model).await;
                    client.disconnect().await;
                    model
                }));
            }
            let mut whole = Vec::new();
            for player in players {
                whole.extend(player.await.expect("no panic"));
            }
            whole
        });
        prop_assert!(disk.content() == model);
    }
}

#[test]
fn the_blocking_client_works_from_several_threads() {
    let disk = Arc::new(MemoryExport::new(PART * PARTS));
    let server = Running::start(Arc::clone(&disk) as Arc<dyn Export>);
    let client = BlockingClient::connect(&server.uri(), &ClientOptions::default()).expect("it listens");
    assert_eq!((client.size(), client.read_only()), (PART * PARTS, false));
    std::thread::scope(|scope| {
        for number in 0..PARTS {
            let client = &client;
            scope.spawn(move || {
                let data = vec![u8::try_from(number + 1).expect("small"); place(0, PART).len()];
                client.write(number * PART, &data).expect("in range");
                let mut back = vec![0; data.len()];
                client.read(number * PART, &mut back).expect("in range");
                assert!(back == data);
            });
        }
    });
    client.flush().expect("no failure");
    client.disconnect();
    assert!(client.read(0, &mut [0; 1]).is_err());
    assert!(disk.content().iter().all(|&byte| byte != 0));
}
