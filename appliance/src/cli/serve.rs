//! `serve`.

use nbd_server::tls::ClientCertificates;

use super::args::{Global, Serve};
use super::render;
use crate::api::network::{NetworkOptions, Security};
use crate::config::ConfigFile;
use crate::problem::Problem;
use crate::service::{self, ServiceOptions};

pub async fn run(global: &Global, args: &Serve, config: Option<ConfigFile>) -> Result<(), Problem> {
    let options = global.options_with(config.as_ref())?;
    let network = network(args).or_else(|| config.as_ref()?.network());
    if let (true, Some(config)) = (args.check, &config) {
        config.check()?;
        let policies: Vec<String> = config.policies()?.into_keys().collect();
        let repository = options.repository_path()?;
        let address = network.as_ref().map(|network| network.listen);
        if global.json {
            render::json(&serde_json::json!({
                "ok": true, "repository": repository, "state": options.state, "listen": address, "policies": policies,
            }));
            return Ok(());
        }
        let listen = address.map_or("its socket only".to_owned(), |address| address.to_string());
        render::pairs(&[
            ("repository", repository.display().to_string()),
            ("state folder", options.state.display().to_string()),
            ("listens on", listen),
            ("policies", if policies.is_empty() { "-".to_owned() } else { policies.join(", ") }),
        ]);
        render::line("the configuration is good");
        return Ok(());
    }
    let (policies, alerts, hooks) = match &config {
        Some(config) => (config.policies()?, config.alerts().clone(), config.config.hooks.clone()),
        None => Default::default(),
    };
    let (background, clock_speed) = (args.background, args.clock_speed);
    let service = ServiceOptions { background, network, policies, alerts, hooks, clock_speed };
    service::serve(&options, &service, render::line).await
}

/// Where the command line says to listen.
fn network(args: &Serve) -> Option<NetworkOptions> {
    let clients = match args.client_certificates {
        true => ClientCertificates::Required,
        false => ClientCertificates::Waived,
    };
    let security = match args.insecure_http {
        true => Security::Plain,
        false => Security::Tls { folder: args.tls_dir.clone(), clients },
    };
    args.listen.map(|listen| NetworkOptions { listen, security })
}
