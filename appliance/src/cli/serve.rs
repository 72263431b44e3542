//! `serve`.

use nbd_server::tls::ClientCertificates;

use super::args::{Global, Serve};
use super::render;
use crate::api::network::{NetworkOptions, Security};
use crate::problem::Problem;
use crate::service::{self, ServiceOptions};

pub async fn run(global: &Global, args: &Serve) -> Result<(), Problem> {
    let clients = match args.client_certificates {
        true => ClientCertificates::Required,
        false => ClientCertificates::Waived,
    };
    let security = match args.insecure_http {
        true => Security::Plain,
        false => Security::Tls { folder: args.tls_dir.clone(), clients },
    };
    let network = args.listen.map(|listen| NetworkOptions { listen, security });
    let service = ServiceOptions { background: args.background, network };
    service::serve(&global.options()?, &service, render::line).await
}
