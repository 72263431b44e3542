//! `tls`: makes certificates. It works on a folder alone and asks nobody.

use nbd_server::tls::pki;

use super::args::{Global, Tls};
use super::render;
use crate::problem::Problem;

pub fn run(global: &Global, args: &Tls) -> Result<(), Problem> {
    let cannot = |error: &pki::PkiError| Problem::from_pki(&args.dir, error);
    let made = match pki::create(&args.dir) {
        Ok(()) => true,
        Err(pki::PkiError::Exists(_)) => false,
        Err(error) => return Err(cannot(&error)),
    };
    let mut folders = Vec::new();
    for host in &args.hosts {
        let names: Vec<&str> = host.split(',').collect();
        folders.push(pki::add_host(&args.dir, &names).map_err(|error| cannot(&error))?);
    }
    if global.json {
        render::json(&serde_json::json!({ "authority": args.dir, "made_authority": made, "hosts": folders }));
        return Ok(());
    }
    if made {
        render::line(&format!("made a certificate authority in {}; keep {} secret", args.dir.display(), pki::CA_KEY));
    }
    for folder in folders {
        render::line(&format!(
            "made {}: copy it to that host, for --tls-dir and as tls-certificates",
            folder.display()
        ));
    }
    Ok(())
}
