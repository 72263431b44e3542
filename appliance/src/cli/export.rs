//! `export`: serves in the foreground until interrupted.

use std::path::Path;

use axum::http::Method;

use super::args::{Export, Global};
use super::connect::Door;
use super::render;
use crate::problem::{Kind, Problem};
use crate::publish::{ExportRequest, Served, TlsRequest};
use crate::signals::stop_signal;

pub async fn run(door: &Door, global: &Global, args: &Export) -> Result<(), Problem> {
    let overlay = args.overlay.as_ref().map(std::path::absolute).transpose();
    let request = ExportRequest {
        point: args.point.clone(),
        disk: args.disk.clone(),
        listen: absolute(&args.listen)?,
        read_only: args.read_only,
        overlay: overlay.map_err(|error| Problem::failed("cannot use the overlay's folder", &error))?,
        tls: tls(args.tls_dir.as_deref(), args.tls_anonymous_clients, &args.tls_clients)?,
        insecure_tcp: args.insecure_tcp.clone(),
    };
    let mut events = door.client.stream(Method::POST, "/api/v1/exports", Some(&request)).await?;
    loop {
        let event = tokio::select! {
            event = events.next() => event?,
            () = stop_signal() => return Ok(()),
        };
        match event {
            Some((name, data)) if name == "serving" => show(global, &data)?,
            Some(_) => {}
            None => return Err(Problem::new(Kind::Failed, "the service that hosts the export has ended")),
        }
    }
}

/// How to serve with TLS, by the certificates in `dir`.
pub(super) fn tls(
    dir: Option<&Path>,
    anonymous_clients: bool,
    clients: &[String],
) -> Result<Option<TlsRequest>, Problem> {
    let Some(dir) = dir else { return Ok(None) };
    let dir =
        std::path::absolute(dir).map_err(|error| Problem::failed("cannot use the certificates' folder", &error))?;
    Ok(Some(TlsRequest { dir, anonymous_clients, clients: clients.to_vec() }))
}

fn show(global: &Global, data: &str) -> Result<(), Problem> {
    let served: Vec<Served> =
        serde_json::from_str(data).map_err(|error| Problem::failed("cannot read what is served", &error))?;
    if global.json {
        render::json(&serde_json::json!({ "disks": served }));
        return Ok(());
    }
    for disk in served {
        render::line(&disk.uri);
    }
    Ok(())
}

/// The socket's path is this process's, and another may do the work.
fn absolute(listen: &str) -> Result<String, Problem> {
    let Some(path) = listen.strip_prefix("unix:") else { return Ok(listen.to_owned()) };
    let path = std::path::absolute(path)
        .map_err(|error| Problem::because(Kind::Usage, format!("cannot listen on `{listen}`"), &error))?;
    Ok(format!("unix:{}", path.display()))
}
