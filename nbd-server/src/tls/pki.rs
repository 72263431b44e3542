//! A small certificate authority: enough that two hosts trust each other and nobody else.
//!
//! The authority's folder holds [`CA_CERT`] and its key, and a folder for each host, with what that host needs to be
//! server and client: it is copied there, the authority's key stays where it is. A host's folder appears whole or not at
//! all: 1. its files are written and synced under another name, 2. the folder is renamed, 3. the parent is synced. A crash
//! before 2 leaves a folder with a name that begins with a dot, which the next attempt replaces.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

use super::{CA_CERT, CLIENT_CERT, CLIENT_KEY, SERVER_CERT, SERVER_KEY};

/// The key of an authority. Who has it can make certificates that every host believes.
pub const CA_KEY: &str = "ca-key.pem";

/// The authority's name; a host is added later under the same one.
pub const AUTHORITY: &str = "Lifeboat NBD certificate authority";

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Clocks differ: a certificate is good a little before it was made.
const EARLY: Duration = DAY;
/// Restores are needed in bad times, so certificates last longer than anybody's memory of how they are renewed.
const AUTHORITY_LASTS: Duration = Duration::from_secs(20 * 365 * 24 * 60 * 60);
const HOST_LASTS: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// Why certificates cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The folder has an authority already; its certificates must not be replaced unasked.
    #[error("{0} holds a certificate authority already")]
    Exists(PathBuf),
    /// The folder has none.
    #[error("{0} holds no certificate authority")]
    NoAuthority(PathBuf),
    /// The host has certificates already.
    #[error("{0} exists already")]
    HostExists(PathBuf),
    /// The name cannot be a host's, or the name of a folder.
    #[error("'{0}' is neither the name nor the address of a host")]
    HostName(String),
    /// A file cannot be read or written.
    #[error("cannot write {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A certificate or key cannot be made or read.
    #[error("cannot make a certificate")]
    Certificate(#[from] rcgen::Error),
}

/// Makes an authority in a folder, which is made too.
pub fn create(folder: &Path) -> Result<(), PkiError> {
    if folder.join(CA_CERT).exists() || folder.join(CA_KEY).exists() {
        return Err(PkiError::Exists(folder.to_owned()));
    }
    let failed = |source| PkiError::Io { path: folder.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    let key = KeyPair::generate()?;
    let certificate = authority()?.self_signed(&key)?;
    // The key first: an authority is there when its certificate is, and then it has its key.
    write(&folder.join(CA_KEY), &key.serialize_pem(), 0o600)?;
    write(&folder.join(CA_CERT), &certificate.pem(), 0o644)?;
    sync(folder)
}

/// Makes the certificates of a host that goes by these names and addresses; its folder has the first one's name.
/// Returns the folder.
pub fn add_host(folder: &Path, names: &[&str]) -> Result<PathBuf, PkiError> {
    let first = names.first().copied().unwrap_or_default();
    for name in names {
        let plain = name.parse::<IpAddr>().is_ok() || is_host_name(name);
        if !plain {
            return Err(PkiError::HostName((*name).to_owned()));
        }
    }
    let ca_cert = folder.join(CA_CERT);
    if names.is_empty() || !ca_cert.exists() {
        return Err(PkiError::NoAuthority(folder.to_owned()));
    }
    let home = folder.join(first);
    if home.exists() {
        return Err(PkiError::HostExists(home));
    }
    let read = |path: &Path| fs::read_to_string(path).map_err(|source| PkiError::Io { path: path.to_owned(), source });
    let issuer = Issuer::new(authority()?, KeyPair::from_pem(&read(&folder.join(CA_KEY))?)?);
    let fresh = folder.join(format!(".{first}"));
    let failed = |source| PkiError::Io { path: fresh.clone(), source };
    if fresh.exists() {
        fs::remove_dir_all(&fresh).map_err(failed)?;
    }
    DirBuilder::new().mode(0o700).create(&fresh).map_err(failed)?;
    write(&fresh.join(CA_CERT), &read(&ca_cert)?, 0o644)?;
    for (purpose, certificate, key_file) in [
        (ExtendedKeyUsagePurpose::ServerAuth, SERVER_CERT, SERVER_KEY),
        (ExtendedKeyUsagePurpose::ClientAuth, CLIENT_CERT, CLIENT_KEY),
    ] {
        let key = KeyPair::generate()?;
        let signed = host(names, purpose)?.signed_by(&key, &issuer)?;
        write(&fresh.join(certificate), &signed.pem(), 0o644)?;
        write(&fresh.join(key_file), &key.serialize_pem(), 0o600)?;
    }
    sync(&fresh)?;
    fs::rename(&fresh, &home).map_err(failed)?;
    sync(folder)?;
    Ok(home)
}

/// Letters, digits, dots and hyphens, so that it can name a folder too and hides none.
fn is_host_name(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

fn authority() -> Result<CertificateParams, rcgen::Error> {
    let mut params = dated(CertificateParams::new(Vec::new())?, AUTHORITY_LASTS);
    params.distinguished_name.push(DnType::CommonName, AUTHORITY);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn host(names: &[&str], purpose: ExtendedKeyUsagePurpose) -> Result<CertificateParams, rcgen::Error> {
    let alternative: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = dated(CertificateParams::new(alternative)?, HOST_LASTS);
    params.distinguished_name.push(DnType::CommonName, names.first().copied().unwrap_or_default());
    params.is_ca = IsCa::ExplicitNoCa;
    // QEMU refuses certificates without the second, which elliptic curves have no use for.
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![purpose];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn dated(mut params: CertificateParams, lasts: Duration) -> CertificateParams {
    let now = SystemTime::now();
    params.not_before = (now - EARLY).into();
    params.not_after = (now + lasts).into();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let written = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|source| PkiError::Io { path: path.to_owned(), source })
}

fn sync(folder: &Path) -> Result<(), PkiError> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|source| PkiError::Io { path: folder.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::{ClientCertificates, ClientName, TlsClient, TlsServer, items};

    #[test]
    fn an_authority_makes_hosts_that_can_be_servers_and_clients() {
        let folder = tempfile::tempdir().expect("a folder");
        let ca = folder.path().join("pki");
        assert!(matches!(add_host(&ca, &["a"]), Err(PkiError::NoAuthority(_))));
        create(&ca).expect("an authority");
        assert!(matches!(create(&ca), Err(PkiError::Exists(_))));
        fs::create_dir(ca.join(".a.example")).expect("as a crash leaves it");
        let home = add_host(&ca, &["a.example", "10.0.0.1", "::1"]).expect("a host");
        assert_eq!(home, ca.join("a.example"));
        assert!(!ca.join(".a.example").exists());
        assert!(matches!(add_host(&ca, &["a.example"]), Err(PkiError::HostExists(_))));
        TlsServer::from_folder(&home, ClientCertificates::Required).expect("a server's folder");
        TlsClient::from_folder(&home).expect("a client's folder");
        let certificate = &items(&home.join(CLIENT_CERT), "certificate").expect("one")[0];
        for (name, is) in [("a.example", true), ("10.0.0.1", true), ("::1", true), ("b.example", false)] {
            assert_eq!(ClientName::new(name).expect("a name").is_of(certificate), is, "{name}");
        }
        let stranger = ClientName::new("b.example").expect("a name");
        assert_eq!(stranger.presented(certificate), ["a.example", "10.0.0.1", "::1"]);
    }

    #[test]
    fn names_that_cannot_be_hosts_make_no_folders() {
        let folder = tempfile::tempdir().expect("a folder");
        create(folder.path()).expect("an authority");
        for bad in ["", ".", "..", "a/b", "-a", "a..b", "a b", "../x"] {
            assert!(matches!(add_host(folder.path(), &["good", bad]), Err(PkiError::HostName(_))), "{bad}");
        }
        let mut names: Vec<_> = fs::read_dir(folder.path()).expect("there").flatten().map(|e| e.file_name()).collect();
        names.sort();
        assert_eq!(names, [CA_CERT, CA_KEY]);
    }

    #[test]
    fn keys_are_private() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        create(folder.path()).expect("an authority");
        let home = add_host(folder.path(), &["h"]).expect("a host");
        for key in [folder.path().join(CA_KEY), home.join(SERVER_KEY), home.join(CLIENT_KEY)] {
            assert_eq!(fs::metadata(&key).expect("there").permissions().mode() & 0o777, 0o600, "{}", key.display());
        }
    }
}
