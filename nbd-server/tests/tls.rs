//! TLS: who gets in, what is said before it, and clients written by others.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{Running, go, name, path, succeed, u32_at};
use nbd_server::tls::{self, pki};
use nbd_server::{
    Access, BlockingClient, ClientCertificates, ClientError, ClientName, ClientOptions, Export, ExportTable, Limits,
    Listen, MemoryExport, NbdUri, Server, TlsServer, UriTls,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};

const MIB: usize = 1 << 20;
const TLS_REQD: u32 = (1 << 31) + 5;
const INVALID: u32 = (1 << 31) + 3;
const UNKNOWN: u32 = (1 << 31) + 6;

/// An authority with the hosts `localhost` and `other.example`.
fn authority() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    pki::create(folder.path()).expect("an authority");
    let ours = pki::add_host(folder.path(), &["localhost", "127.0.0.1"]).expect("a host");
    let other = pki::add_host(folder.path(), &["other.example"]).expect("a host");
    (folder, ours, other)
}

fn content() -> Vec<u8> {
    (0..8 * MIB).map(|at| if at % (2 * MIB) < MIB { (at % 251).to_le_bytes()[0] } else { 0 }).collect()
}

fn serve(export: Arc<dyn Export>, folder: &Path, clients: ClientCertificates, listen: Option<Listen>) -> Running {
    let table = Arc::new(ExportTable::new());
    table.add(name("disk"), export).expect("an empty table");
    start(table, folder, clients, listen, Limits::default())
}

fn start(
    table: Arc<ExportTable>,
    folder: &Path,
    clients: ClientCertificates,
    listen: Option<Listen>,
    limits: Limits,
) -> Running {
    let tls = TlsServer::from_folder(folder, clients).expect("good certificates");
    Running::launch(table, listen, move |table| Server::new(table, limits).with_tls(tls))
}

fn loopback() -> Option<Listen> {
    Some("tcp:127.0.0.1:0".parse().expect("an address"))
}

fn uri(server: &Running, host: &str, certificates: &Path) -> NbdUri {
    let tls = UriTls { certificates: Some(certificates.to_owned()), hostname: None };
    match &server.local {
        Listen::Tcp(address) => NbdUri::tcp(host, address.port(), &name("disk")).with_tls(tls),
        Listen::Unix(socket) => NbdUri::unix(socket, &name("disk")).with_tls(tls),
    }
}

fn connect(uri: &NbdUri) -> Result<BlockingClient, ClientError> {
    BlockingClient::connect(uri, &ClientOptions::default())
}

#[test]
fn everything_works_over_tls_by_tcp_and_unix() {
    let (_pki, ours, _) = authority();
    for (listen, resident) in [(loopback(), true), (None, true), (loopback(), false), (None, false)] {
        let disk = MemoryExport::from_bytes(&content());
        let disk = Arc::new(if resident { disk } else { disk.not_resident() });
        let server = serve(Arc::clone(&disk) as Arc<dyn Export>, &ours, ClientCertificates::Required, listen);
        for host in ["localhost", "127.0.0.1"] {
            let client = connect(&uri(&server, host, &ours)).expect("trusted");
            let mut all = vec![0xee; content().len()];
            client.read(0, &mut all).expect("in range");
            assert!(all == content(), "resident {resident}, {host}");
            let big: Vec<u8> = content().iter().rev().copied().collect();
            client.write_durable(0, &big).expect("in range");
            client.trim(4 << 20, 1 << 20).expect("in range");
            assert!(!client.block_status(0, 8 << 20).expect("in range").is_empty());
            client.disconnect();
            assert!(disk.content()[..4 * MIB] == big[..4 * MIB]);
            disk.write(0, &content()).expect("in range");
        }
    }
}

#[test]
fn several_clients_at_depth_see_their_own_writes() {
    let (_pki, ours, _) = authority();
    let disk = Arc::new(MemoryExport::new(64 << 20).not_resident());
    let server = serve(disk, &ours, ClientCertificates::Required, None);
    std::thread::scope(|scope| {
        for number in 0..4_u8 {
            let uri = uri(&server, "localhost", &ours);
            scope.spawn(move || {
                let client = connect(&uri).expect("trusted");
                std::thread::scope(|scope| {
                    for lane in 0..4_u8 {
                        let client = &client;
                        scope.spawn(move || {
                            let base = (u64::from(number) * 4 + u64::from(lane)) << 22;
                            for round in 0..20_u8 {
                                let data = vec![number ^ lane ^ round; 1000 + usize::from(round) * 10_007];
                                client.write(base, &data).expect("in range");
                                let mut back = vec![0; data.len()];
                                client.read(base, &mut back).expect("in range");
                                assert!(back == data, "{number} {lane} {round}");
                            }
                        });
                    }
                });
            });
        }
    });
}

#[test]
fn who_has_no_certificate_of_the_authority_gets_nothing() {
    let (_pki, ours, _) = authority();
    let (_foreign, stranger, _) = authority();
    let server = serve(Arc::new(MemoryExport::new(4096)), &ours, ClientCertificates::Required, loopback());
    // Trusts the server, and has nothing to show.
    let bare = tempfile::tempdir().expect("a folder");
    std::fs::copy(ours.join(tls::CA_CERT), bare.path().join(tls::CA_CERT)).expect("copied");
    let refused = connect(&uri(&server, "localhost", bare.path())).err().expect("refused");
    assert!(matches!(refused, ClientError::Lost(_) | ClientError::TlsHandshake { .. }), "{refused}");
    // Shows a certificate of another authority, and trusts ours.
    let liar = tempfile::tempdir().expect("a folder");
    for file in [tls::CLIENT_CERT, tls::CLIENT_KEY] {
        std::fs::copy(stranger.join(file), liar.path().join(file)).expect("copied");
    }
    std::fs::copy(ours.join(tls::CA_CERT), liar.path().join(tls::CA_CERT)).expect("copied");
    let refused = connect(&uri(&server, "localhost", liar.path())).err().expect("refused");
    assert!(matches!(refused, ClientError::Lost(_) | ClientError::TlsHandshake { .. }), "{refused}");
    // With the requirement waived the first gets in, the second does not.
    let server = serve(Arc::new(MemoryExport::new(4096)), &ours, ClientCertificates::Waived, loopback());
    assert!(connect(&uri(&server, "localhost", bare.path())).is_ok());
    assert!(connect(&uri(&server, "localhost", liar.path())).is_err());
}

#[test]
fn a_client_does_not_talk_to_a_server_it_cannot_trust() {
    let (_pki, ours, other) = authority();
    let (_foreign, stranger, _) = authority();
    let server = serve(Arc::new(MemoryExport::new(4096)), &ours, ClientCertificates::Waived, loopback());
    let error = connect(&uri(&server, "localhost", &stranger)).err().expect("another authority");
    assert!(matches!(error, ClientError::TlsHandshake { .. }), "{error}");
    let server = serve(Arc::new(MemoryExport::new(4096)), &other, ClientCertificates::Waived, loopback());
    let error = connect(&uri(&server, "localhost", &ours)).err().expect("another name");
    assert!(matches!(error, ClientError::TlsHandshake { .. }), "{error}");
    let mut named = uri(&server, "localhost", &ours);
    named.tls.as_mut().expect("TLS").hostname = Some("other.example".to_owned());
    assert!(connect(&named).is_ok(), "the name that the URI gives counts");
    named.tls.as_mut().expect("TLS").certificates = None;
    assert!(matches!(connect(&named), Err(ClientError::NoCertificates { .. })));
    named.tls.as_mut().expect("TLS").certificates = Some("/nonexistent".into());
    assert!(matches!(connect(&named), Err(ClientError::Tls { .. })));
    // A server without TLS does not make the client go on in the clear.
    let plain = Running::start(Arc::new(MemoryExport::new(4096)));
    let error = connect(&uri(&plain, "localhost", &ours)).err().expect("no TLS");
    assert!(matches!(error, ClientError::Refused { .. }), "{error}");
}

#[test]
fn a_revoked_certificate_is_worth_nothing() {
    let (pki_folder, ours, _) = authority();
    let crl = revoke_client(pki_folder.path(), &ours);
    std::fs::write(ours.join(tls::CA_CRL), crl).expect("written");
    let server = serve(Arc::new(MemoryExport::new(4096)), &ours, ClientCertificates::Required, loopback());
    assert!(connect(&uri(&server, "localhost", &ours)).is_err());
    let other = pki_folder.path().join("other.example");
    assert!(connect(&uri(&server, "localhost", &other)).is_ok(), "others are as good as before");
}

fn named(common_name: &str) -> rcgen::CertificateParams {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, common_name);
    params
}

/// The list by which the authority revokes a host's client certificate. Serial numbers are found by looking.
fn revoke_client(authority: &Path, host: &Path) -> String {
    let der = CertificateDer::from_pem_file(host.join(tls::CLIENT_CERT)).expect("a certificate");
    // SEQUENCE, SEQUENCE, [0] version, INTEGER serial number: fixed lengths up to the last.
    let at = der.windows(5).position(|window| window == [0xa0, 3, 2, 1, 2]).expect("a version") + 5;
    assert_eq!(der[at], 2, "an integer");
    let serial = &der[at + 2..at + 2 + usize::from(der[at + 1])];
    let read = |file: &str| std::fs::read_to_string(authority.join(file)).expect("there");
    let key = rcgen::KeyPair::from_pem(&read(pki::CA_KEY)).expect("a key");
    let mut params = named(pki::AUTHORITY);
    params.key_usages = vec![rcgen::KeyUsagePurpose::CrlSign];
    let now = std::time::SystemTime::now();
    let revoked = rcgen::RevokedCertParams {
        serial_number: rcgen::SerialNumber::from_slice(serial),
        revocation_time: now.into(),
        reason_code: None,
        invalidity_date: None,
    };
    let list = rcgen::CertificateRevocationListParams {
        this_update: now.into(),
        next_update: (now + Duration::from_secs(86400)).into(),
        crl_number: rcgen::SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: vec![revoked],
        key_identifier_method: rcgen::KeyIdMethod::Sha256,
    };
    list.signed_by(&rcgen::Issuer::new(params, key)).expect("signed").pem().expect("encoded")
}

#[test]
fn nothing_is_said_before_tls() {
    let (_pki, ours, _) = authority();
    let server = serve(Arc::new(MemoryExport::new(4096)), &ours, ClientCertificates::Required, None);
    let mut raw = server.connect();
    raw.greet(3);
    for (option, data) in
        [(3, vec![]), (6, go("disk", &[])), (7, go("disk", &[])), (8, vec![]), (11, vec![]), (9, vec![]), (99, vec![])]
    {
        let replies = raw.option(option, &data);
        assert_eq!((replies.len(), replies[0].0), (1, TLS_REQD), "option {option}");
    }
    assert_eq!(raw.option(5, b"data").last().map(|reply| reply.0), Some(INVALID));
    assert_eq!(raw.option(2, &[]).last().map(|reply| reply.0), Some(1));
    assert!(raw.is_closed());
    let mut old = server.connect();
    old.greet(3);
    old.send_option(1, b"disk");
    assert!(old.is_closed(), "the old form cannot be refused in words");
    let mut noise = server.connect();
    noise.greet(3);
    assert_eq!(noise.option(5, &[]).last().map(|reply| reply.0), Some(1));
    noise.send_option(7, &go("disk", &[])); // in the clear after TLS has begun
    let mut rest = Vec::new();
    let _ = noise.socket.read_to_end(&mut rest);
    assert!(!rest.windows(8).any(|window| window == 0x0003_e889_0455_65a9_u64.to_be_bytes()), "no option reply");
}

/// Raw bytes inside TLS.
struct Secure(rustls::StreamOwned<rustls::ClientConnection, UnixStream>);

impl Secure {
    fn open(server: &Running, certificates: &Path) -> Secure {
        let mut raw = server.connect();
        raw.greet(3);
        assert_eq!(raw.option(5, &[]), [(1, vec![])]);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        let certificate = |file| CertificateDer::from_pem_file(certificates.join(file)).expect("a certificate");
        roots.add(certificate(tls::CA_CERT)).expect("an authority");
        let key = rustls::pki_types::PrivateKeyDer::from_pem_file(certificates.join(tls::CLIENT_KEY)).expect("a key");
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![certificate(tls::CLIENT_CERT)], key)
            .expect("an identity");
        let host = ServerName::try_from("localhost").expect("a name");
        let connection = rustls::ClientConnection::new(Arc::new(config), host).expect("a client");
        Secure(rustls::StreamOwned::new(connection, raw.socket))
    }

    fn option(&mut self, kind: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let length = u32::try_from(data.len()).expect("short").to_be_bytes();
        self.0.write_all(&[common::OPTION, &kind.to_be_bytes(), &length, data].concat()).expect("sent");
        let mut replies = Vec::new();
        loop {
            let mut head = [0; 20];
            self.0.read_exact(&mut head).expect("a reply");
            let mut data = vec![0; u32_at(&head, 16) as usize];
            self.0.read_exact(&mut data).expect("its data");
            replies.push((u32_at(&head, 12), data));
            if replies.last().is_some_and(|(kind, _)| *kind == 1 || kind >> 31 == 1) {
                return replies;
            }
        }
    }
}

#[test]
fn an_export_for_some_is_unknown_to_others() {
    let (pki_folder, ours, other) = authority();
    let table = Arc::new(ExportTable::new());
    table.add(name("all"), Arc::new(MemoryExport::new(4096))).expect("free");
    let only = Access::Clients(vec![ClientName::new("other.example").expect("a name")]);
    table.add_for(name("some"), Arc::new(MemoryExport::new(4096)), only).expect("free");
    let server = start(table, &ours, ClientCertificates::Required, None, Limits::default());
    let names = |client: &mut Secure| -> Vec<Vec<u8>> {
        let listed = client.option(3, &[]);
        listed.iter().filter(|reply| reply.0 == 2).map(|reply| reply.1[4..8.min(reply.1.len())].to_vec()).collect()
    };
    let mut outsider = Secure::open(&server, &ours);
    assert_eq!(names(&mut outsider), [b"alla".to_vec()]); // the name, then its description
    assert_eq!(outsider.option(6, &go("some", &[])).last().map(|reply| reply.0), Some(UNKNOWN));
    assert_eq!(outsider.option(7, &go("some", &[])).last().map(|reply| reply.0), Some(UNKNOWN));
    assert_eq!(outsider.option(8, &[]).last().map(|reply| reply.0), Some(1));
    let contexts = common::contexts("some", &["base:allocation"]);
    assert_eq!(outsider.option(10, &contexts).last().map(|reply| reply.0), Some(UNKNOWN));
    assert_eq!(outsider.option(5, &[]).last().map(|reply| reply.0), Some(INVALID), "TLS within TLS");
    assert_eq!(outsider.option(7, &go("all", &[])).last().map(|reply| reply.0), Some(1));
    let mut insider = Secure::open(&server, &other);
    assert_eq!(names(&mut insider), [b"alla".to_vec(), b"some".to_vec()]);
    assert_eq!(insider.option(7, &go("some", &[])).last().map(|reply| reply.0), Some(1));
    drop(pki_folder);
}

/// Puts the files of another folder into this one, one after the other and each whole.
fn replace(folder: &Path, with: &Path, files: &[&str]) {
    for file in files {
        let fresh = folder.join(format!("{file}.new"));
        std::fs::copy(with.join(file), &fresh).expect("copied");
        std::fs::rename(&fresh, folder.join(file)).expect("renamed");
    }
}

#[test]
fn certificates_that_change_count_from_the_next_connection_on() {
    let (_pki, ours, _) = authority();
    let (_other_pki, next, _) = authority();
    let served = tempfile::tempdir().expect("a folder");
    let all = [tls::CA_CERT, tls::SERVER_CERT, tls::SERVER_KEY];
    replace(served.path(), &ours, &all);
    let disk = Arc::new(MemoryExport::from_bytes(&content()));
    let server = serve(disk, served.path(), ClientCertificates::Required, loopback());
    let (old, new) = (uri(&server, "localhost", &ours), uri(&server, "localhost", &next));
    let open = connect(&old).expect("trusted");
    assert!(connect(&new).is_err());
    // Half of it, and nonsense: what was there before stays in use.
    replace(served.path(), &next, &[tls::SERVER_KEY]);
    connect(&old).expect("the former certificate");
    std::fs::write(served.path().join(tls::CA_CERT), "-----BEGIN CERTIFICATE-----").expect("written");
    connect(&old).expect("the former certificate");
    replace(served.path(), &next, &all);
    connect(&new).expect("the new authority");
    assert!(connect(&old).is_err(), "the former authority counts no more");
    // Revoked while the server runs, and taken back.
    std::fs::write(served.path().join(tls::CA_CRL), revoke_client(_other_pki.path(), &next)).expect("written");
    assert!(connect(&new).is_err());
    std::fs::remove_file(served.path().join(tls::CA_CRL)).expect("there");
    connect(&new).expect("no longer revoked");
    let mut data = [0; 512];
    open.read(0, &mut data).expect("who is in stays in");
    assert!(data == content()[..512]);
}

/// Gives a folder a client certificate of the authority in `authority`.
fn certify(authority: &Path, folder: &Path, common_name: &str, alternative: &[&str]) {
    let read = |file: &str| std::fs::read_to_string(authority.join(file)).expect("there");
    let key = rcgen::KeyPair::from_pem(&read(pki::CA_KEY)).expect("a key");
    let issuer = rcgen::Issuer::new(named(pki::AUTHORITY), key);
    let alternative: Vec<String> = alternative.iter().map(|name| (*name).to_owned()).collect();
    let mut params = rcgen::CertificateParams::new(alternative).expect("names");
    params.distinguished_name = named(common_name).distinguished_name;
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let key = rcgen::KeyPair::generate().expect("a key");
    let signed = params.signed_by(&key, &issuer).expect("signed");
    std::fs::write(folder.join(tls::CLIENT_CERT), signed.pem()).expect("written");
    std::fs::write(folder.join(tls::CLIENT_KEY), key.serialize_pem()).expect("written");
    std::fs::copy(authority.join(tls::CA_CERT), folder.join(tls::CA_CERT)).expect("copied");
}

#[test]
fn every_export_has_a_list_of_its_own_and_a_common_name_is_nobodys() {
    let (pki_folder, ours, _) = authority();
    let table = Arc::new(ExportTable::new());
    let only = |names: &[&str]| {
        Access::Clients(names.iter().map(|name| ClientName::new(name).expect("a name")).collect::<Vec<_>>())
    };
    for (export, access) in [
        ("a", only(&["a.example"])),
        ("b", only(&["b.example", "10.1.2.3"])),
        ("both", only(&["a.example", "b.example"])),
        ("open", Access::Everyone),
    ] {
        table.add_for(name(export), Arc::new(MemoryExport::new(4096)), access).expect("free");
    }
    let server = start(table, &ours, ClientCertificates::Required, None, Limits::default());
    let opens = |common_name: &str, alternative: &[&str]| -> Vec<&str> {
        let folder = tempfile::tempdir().expect("a folder");
        certify(pki_folder.path(), folder.path(), common_name, alternative);
        let exports = ["a", "b", "both", "open"].into_iter();
        let open = exports.filter(|export| {
            let mut client = Secure::open(&server, folder.path());
            let answer = client.option(7, &go(export, &[])).last().map(|reply| reply.0);
            assert!(matches!(answer, Some(1 | UNKNOWN)), "{answer:?}");
            answer == Some(1)
        });
        open.collect()
    };
    assert_eq!(opens("x", &["a.example"]), ["a", "both", "open"]);
    assert_eq!(opens("x", &["10.1.2.3"]), ["b", "open"]);
    assert_eq!(opens("x", &["a.example", "b.example"]), ["a", "b", "both", "open"]);
    assert_eq!(opens("a.example", &["c.example"]), ["open"]);
    assert_eq!(opens("a.example", &[]), ["open"]);
}

#[test]
fn a_tls_handshake_that_stands_still_ends_at_the_deadline() {
    let (_pki, ours, _) = authority();
    let table = Arc::new(ExportTable::new());
    table.add(name("disk"), Arc::new(MemoryExport::new(4096))).expect("an empty table");
    let limits = Limits { handshake: Duration::from_millis(300), ..Limits::default() };
    let server = start(table, &ours, ClientCertificates::Required, None, limits);
    for bytes in [&b""[..], b"\x16\x03\x01\x40\x00", b"\x16\x03\x01"] {
        let mut raw = server.connect();
        raw.greet(3);
        assert_eq!(raw.option(5, &[]), [(1, vec![])]);
        raw.send(&[bytes]);
        let mut rest = Vec::new();
        raw.socket.read_to_end(&mut rest).expect("closed by the server");
    }
}

#[test]
fn the_end_of_a_server_reaches_clients_as_an_orderly_end_of_tls() {
    let (_pki, ours, _) = authority();
    let mut server = serve(Arc::new(MemoryExport::new(4096)), &ours, ClientCertificates::Required, None);
    let mut client = Secure::open(&server, &ours);
    assert_eq!(client.option(7, &go("disk", &[])).last().map(|reply| reply.0), Some(1));
    server.stop();
    let mut rest = Vec::new();
    client.0.read_to_end(&mut rest).expect("close_notify before the end");
    assert_eq!(rest, [0; 0]);
    drop(client);
    server.join();
}

#[test]
fn broken_folders_are_told_apart() {
    let (_pki, ours, other) = authority();
    let open = |folder: &Path| TlsServer::from_folder(folder, ClientCertificates::Required).map(drop);
    let told = |folder: &Path| open(folder).expect_err("broken").to_string();
    assert!(told(Path::new("/nonexistent")).contains("ca-cert.pem"));
    std::fs::copy(other.join(tls::SERVER_KEY), ours.join(tls::SERVER_KEY)).expect("copied");
    assert!(told(&ours).contains("server-cert.pem"), "a key that belongs to another certificate");
    std::fs::write(ours.join(tls::SERVER_KEY), "no key").expect("written");
    assert!(told(&ours).contains("server-key.pem"));
    std::fs::write(ours.join(tls::CA_CERT), "no certificate").expect("written");
    assert!(told(&ours).contains("ca-cert.pem"));
    std::fs::write(ours.join(tls::CA_CERT), vec![b'x'; 5 << 20]).expect("written");
    assert!(told(&ours).contains("ca-cert.pem"));
}

#[test]
fn libnbd_reads_and_writes_over_tls() {
    let (_pki, ours, _) = authority();
    let disk = Arc::new(MemoryExport::from_bytes(&content()).not_resident());
    let server = serve(Arc::clone(&disk) as Arc<dyn Export>, &ours, ClientCertificates::Required, loopback());
    let uri = uri(&server, "localhost", &ours).to_string();
    let Some(json) = succeed("nbdinfo", &["--json", &uri]) else { return };
    assert!(json.contains("\"TLS\": true") && json.contains("\"export-size\": 8388608"), "{json}");
    let Some(listed) = succeed("nbdinfo", &["--list", "--json", &uri]) else { return };
    assert!(listed.contains("\"export-name\": \"disk\""), "{listed}");
    let folder = tempfile::tempdir().expect("a folder");
    let copy = folder.path().join("copy");
    succeed("nbdcopy", &[&uri, path(&copy)]).expect("there a moment ago");
    assert!(std::fs::read(&copy).expect("there") == content());
    let back: Vec<u8> = content().iter().map(|byte| !byte).collect();
    std::fs::write(&copy, &back).expect("written");
    succeed("nbdcopy", &[path(&copy), &uri]).expect("there a moment ago");
    assert!(disk.content() == back);
}

#[test]
fn qemu_reads_and_writes_over_tls() {
    let (_pki, ours, _) = authority();
    for listen in [loopback(), None] {
        let disk = Arc::new(MemoryExport::from_bytes(&content()));
        let server = serve(Arc::clone(&disk) as Arc<dyn Export>, &ours, ClientCertificates::Required, listen);
        let credentials = format!("tls-creds-x509,id=t0,endpoint=client,dir={}", path(&ours));
        let place = match &server.local {
            Listen::Tcp(address) => format!("server.type=inet,server.host=127.0.0.1,server.port={}", address.port()),
            Listen::Unix(socket) => format!("server.type=unix,server.path={}", path(socket)),
        };
        let image = format!("driver=nbd,{place},export=disk,tls-creds=t0,tls-hostname=localhost");
        let folder = tempfile::tempdir().expect("a folder");
        let copy = folder.path().join("copy");
        let read = ["convert", "--object", &credentials, "--image-opts", &image, "-O", "raw", path(&copy)];
        if succeed("qemu-img", &read).is_none() {
            return;
        }
        assert!(std::fs::read(&copy).expect("there") == content());
        let io = ["--object", &credentials, "--image-opts", &image, "-c", "write -P 0xcd 1M 2M", "-c", "flush"];
        succeed("qemu-io", &io).expect("there a moment ago");
        assert!(disk.content()[MIB..3 * MIB].iter().all(|&byte| byte == 0xcd));
    }
}
