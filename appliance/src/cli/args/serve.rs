//! Serving disks without a VM, and the service.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;

#[derive(Debug, Args)]
pub struct Export {
    /// An id prefix, MACHINE, MACHINE~1 or MACHINE@TIME
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub point: String,
    /// Only this disk [default: all]
    #[arg(long)]
    pub disk: Option<String>,
    /// unix:PATH or tcp:ADDRESS:PORT (without TLS loopback only; port 0 takes a free one)
    #[arg(long, value_name = "ADDRESS")]
    pub listen: String,
    /// Refuse writes
    #[arg(long)]
    pub read_only: bool,
    /// Keep what is written in this folder, and go on with what it holds [default: a throw-away overlay]
    #[arg(long, value_name = "DIR")]
    pub overlay: Option<PathBuf>,
    /// Serve with TLS only, by ca-cert.pem, server-cert.pem and server-key.pem in this folder (and ca-crl.pem if it is
    /// there); clients must have a certificate of that authority. Files that change count from the next connection on
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// Only for clients whose certificate is for this name (a subject alternative name), of all disks or of DISK only;
    /// may be repeated [default: all of the authority's]
    #[arg(long = "tls-client", value_name = "[DISK=]NAME", requires = "tls_dir")]
    pub tls_clients: Vec<String>,
    /// Let everybody in who can connect, with TLS but without a certificate
    #[arg(long, requires = "tls_dir", conflicts_with = "tls_clients")]
    pub tls_anonymous_clients: bool,
    /// Serve other machines without TLS, readable and writable for whoever reaches the address: repeat what --listen says
    #[arg(long, value_name = "ADDRESS", conflicts_with = "tls_dir")]
    pub insecure_tcp: Option<String>,
}

#[derive(Debug, Args)]
pub struct Tls {
    /// The authority's folder; made if there is none
    pub dir: PathBuf,
    /// Make certificates for a host, as server and as client: its name, and further names and addresses it goes by
    #[arg(long = "host", required = true, value_name = "NAME[,NAME...]")]
    pub hosts: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Commands on the same state folder speak with the service through its socket, which is for the owner of the folder. With\n\
--listen it answers on the network too, to those who have a token (`lifeboat token create`). Without --tls-dir it makes\n\
certificates in STATE/tls; clients believe them by STATE/tls/ca-cert.pem.")]
pub struct Serve {
    /// Take what the command line does not say from this file; docs/guide/lifeboat.toml explains its keys
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Only say whether the configuration is good, and line and key of what is not
    #[arg(long, requires = "config")]
    pub check: bool,
    /// Answer the API on this address too, over HTTPS; port 0 takes a free one. Its URL is printed
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// Show server-cert.pem of this folder, whose key is server-key.pem, to clients
    #[arg(long, value_name = "DIR", requires = "listen")]
    pub tls_dir: Option<PathBuf>,
    /// Clients must also have a certificate of the authority in ca-cert.pem, and none that ca-crl.pem revokes
    #[arg(long, requires = "listen")]
    pub client_certificates: bool,
    /// Answer over HTTP, without TLS; on loopback only
    #[arg(long, requires = "listen", conflicts_with_all = ["tls_dir", "client_certificates"])]
    pub insecure_http: bool,
    /// Started by another command: end when there is nothing left to serve
    #[arg(long, hide = true)]
    pub background: bool,
    /// For rehearsals: the clock that policies go by runs so many times as fast
    #[arg(long, hide = true, value_name = "TIMES", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub clock_speed: u32,
}
