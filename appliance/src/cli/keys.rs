//! `key`.

use std::path::Path;

use axum::http::Method;

use super::args::{Global, Key, NewKey, RemoveKey};
use super::client::{Client, segment};
use super::connect::{Door, NOTHING};
use super::render;
use crate::app::{make_key_file, read_passphrase, read_small};
use crate::keys::{KeyChange, KeyView, NewKeyRequest, NewSecret, check_label};
use crate::problem::Problem;

pub async fn run(door: &Door, global: &Global, command: &Key) -> Result<(), Problem> {
    match command {
        Key::List => list(door, global).await,
        Key::Add(args) => {
            check(&slots(door).await?, args)?;
            new(door, global, args, "/api/v1/keys").await
        }
        Key::Rotate(args) => {
            check(slots(door).await?.iter().filter(|slot| !slot.in_use), args)?;
            new(door, global, args, "/api/v1/keys/rotate").await
        }
        Key::Remove(args) => remove(door, global, args).await,
    }
}

async fn slots(door: &Door) -> Result<Vec<KeyView>, Problem> {
    door.client.call(Method::GET, "/api/v1/keys", NOTHING).await
}

async fn list(door: &Door, global: &Global) -> Result<(), Problem> {
    let slots = slots(door).await?;
    if global.json {
        render::json(&slots);
        return Ok(());
    }
    let row = |slot: &KeyView| {
        let state = match &slot.damaged {
            Some(damage) => format!("DAMAGED: {damage}"),
            None if slot.in_use => "in use".to_owned(),
            None => String::new(),
        };
        vec![
            slot.slot.clone(),
            slot.kind.clone().unwrap_or_else(|| "-".to_owned()),
            slot.created.map_or("-".to_owned(), render::time),
            slot.label.clone(),
            state,
        ]
    };
    render::table(&["SLOT", "KIND", "CREATED", "LABEL", ""], &slots.iter().map(row).collect::<Vec<_>>(), &[]);
    Ok(())
}

/// Whatever refuses a key refuses before a key file is made.
fn check<'a>(slots: impl IntoIterator<Item = &'a KeyView>, args: &NewKey) -> Result<(), Problem> {
    check_label(slots, args.label.as_deref().unwrap_or_default())
}

/// `add` and `rotate`.
async fn new(door: &Door, global: &Global, args: &NewKey, path: &str) -> Result<(), Problem> {
    let secret = new_secret(args)?;
    let request = NewKeyRequest { secret, label: args.label.clone().unwrap_or_default() };
    let change: KeyChange = door.client.call(Method::POST, path, Some(&request)).await?;
    tell(door, global, &change);
    Ok(())
}

async fn remove(door: &Door, global: &Global, args: &RemoveKey) -> Result<(), Problem> {
    let path = format!("/api/v1/keys/{}", segment(&args.slot));
    let change: KeyChange = door.client.call(Method::DELETE, &path, NOTHING).await?;
    tell(door, global, &change);
    Ok(())
}

/// What was done, then what follows from it.
fn tell(door: &Door, global: &Global, change: &KeyChange) {
    if global.json {
        render::json(change);
    } else {
        if let Some(slot) = &change.added {
            render::line(&format!("added key slot {slot}"));
        }
        if let Some(slot) = &change.removed {
            render::line(&format!("removed key slot {slot}"));
        }
        render::line(&format!("{} can open the repository", render::count(change.left as u64, "key slot")));
    }
    if !change.removed_in_use {
        return;
    }
    let other = if change.added.is_some() { "the new one" } else { "another one" };
    render::note(&format!(
        "the removed key is the one in use: it opens the repository no longer, give {other} from now on"
    ));
    if let Client::Socket { .. } = door.client {
        render::note(&format!(
            "process {}, which serves the state folder, goes on with what it has; it needs {other} when it starts again",
            change.pid
        ));
    }
}

/// From `--new-passphrase-file`, `--new-key-file` or the environment. A key file that does not exist is made first: a
/// slot whose key file is lost would be worth nothing.
fn new_secret(args: &NewKey) -> Result<NewSecret, Problem> {
    if let Some(path) = &args.new_key_file {
        if make_key_file(path)? {
            render::note(&format!("made key file {}; keep a copy of it in a safe place", path.display()));
        }
        return Ok(NewSecret::key_file(&read_small(path, "key file")?));
    }
    if let Some(path) = &args.new_passphrase_file {
        return read_passphrase(Path::new(path)).map(NewSecret::Passphrase);
    }
    match std::env::var("LIFEBOAT_NEW_PASSPHRASE") {
        Ok(passphrase) if !passphrase.is_empty() => Ok(NewSecret::Passphrase(passphrase)),
        _ => Err(Problem::usage("no new passphrase or key file is given")
            .hint("give --new-passphrase-file or --new-key-file, or set LIFEBOAT_NEW_PASSPHRASE")),
    }
}
