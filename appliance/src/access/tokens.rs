//! Tokens of the API: made once, shown once, kept as hashes. Specification of the file: docs/format/tokens.md
//!
//! A token reads `lbt_ID_SECRET`: an id to find it by, and 256 random bits that only their hash is kept of. Random bits
//! need no slow hash: there is nothing to guess them from.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, SubsecRound, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Caller, Role};
use crate::capture::check_name;
use crate::journal::{self, JournalError};
use crate::problem::{Kind, Problem};

/// Every token begins with this, so that a leaked one is found by those who look for leaks.
const PREFIX: &str = "lbt_";
const ID_LEN: usize = 6;
const SECRET_LEN: usize = 32;
/// What the hash is for; another use of the same bits has another hash.
const CONTEXT: &str = "Lifeboat 2026-11 API token";
/// More tokens than this are not kept by people.
const TOKENS_MAX: usize = 1000;
const MACHINES_MAX: usize = 1000;
const VERSION: u32 = 1;

/// A token as it is shown: all but its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TokenView {
    /// Its id, a part of the token.
    pub id: String,
    /// Whose it is.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// The only machines it may do it to; all if absent.
    pub machines: Option<BTreeSet<String>>,
    /// When it was made.
    pub created: DateTime<Utc>,
    /// When it ends; never if absent.
    pub expires: Option<DateTime<Utc>>,
    /// Whether it has ended.
    #[serde(default)]
    pub expired: bool,
}

/// What to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NewTokenRequest {
    /// Whose it is.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// The only machines it may do it to; all if absent.
    #[serde(default)]
    pub machines: Option<BTreeSet<String>>,
    /// When it ends; never if absent.
    #[serde(default)]
    pub expires: Option<DateTime<Utc>>,
}

/// A new token. This is the one time that its secret is seen.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NewToken {
    /// The token itself.
    pub token: String,
    /// What it is.
    #[serde(flatten)]
    pub view: TokenView,
}

impl std::fmt::Debug for NewToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewToken").field("view", &self.view).finish_non_exhaustive()
    }
}

/// A line of the file.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "record", rename_all = "kebab-case")]
enum Record {
    Tokens { version: u32 },
    Token(Kept),
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
struct Kept {
    id: String,
    name: String,
    role: Role,
    machines: Option<BTreeSet<String>>,
    created: DateTime<Utc>,
    expires: Option<DateTime<Utc>>,
    hash: String,
}

impl Kept {
    fn expired(&self, now: DateTime<Utc>) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }

    fn view(&self, now: DateTime<Utc>) -> TokenView {
        TokenView {
            id: self.id.clone(),
            name: self.name.clone(),
            role: self.role,
            machines: self.machines.clone(),
            created: self.created,
            expires: self.expires,
            expired: self.expired(now),
        }
    }
}

/// All tokens of a state folder.
#[derive(Debug)]
pub struct Tokens {
    path: PathBuf,
    kept: Mutex<Result<Vec<Kept>, Problem>>,
}

impl Tokens {
    /// Reads the file. One that is damaged lets nobody in, and says so to whoever asks for tokens; the owner needs none.
    pub fn open(path: PathBuf) -> Tokens {
        let kept = read(&path);
        if let Err(problem) = &kept {
            tracing::error!(%problem, "no token is accepted");
        }
        Tokens { path, kept: Mutex::new(kept) }
    }

    /// All tokens, oldest first.
    pub fn list(&self, now: DateTime<Utc>) -> Result<Vec<TokenView>, Problem> {
        Ok(self.lock().as_ref().map_err(Clone::clone)?.iter().map(|kept| kept.view(now)).collect())
    }

    /// Makes a token. It is durable when this returns.
    pub fn create(&self, request: NewTokenRequest, now: DateTime<Utc>) -> Result<NewToken, Problem> {
        check(&request, now)?;
        let mut slot = self.lock();
        let mut kept = slot.clone()?;
        if kept.iter().any(|kept| kept.name == request.name) {
            return Err(Problem::refused(format!("there is a token named {} already", request.name))
                .hint("choose another name, or revoke it"));
        }
        if kept.len() >= TOKENS_MAX {
            return Err(Problem::refused(format!("there are {TOKENS_MAX} tokens already"))
                .hint("revoke those that are not used; `lifeboat token list` shows them"));
        }
        let (id, secret) = (random::<ID_LEN>()?, random::<SECRET_LEN>()?);
        let fresh = Kept {
            id: hex(&id),
            name: request.name,
            role: request.role,
            machines: request.machines,
            created: now.trunc_subsecs(0),
            expires: request.expires,
            hash: hash(&secret).to_hex().to_string(),
        };
        let token = format!("{PREFIX}{}_{}", fresh.id, hex(&secret));
        let view = fresh.view(now);
        kept.push(fresh);
        self.store(&mut slot, kept)?;
        Ok(NewToken { token, view })
    }

    /// Ends the token with this name or id. It is durable when this returns.
    pub fn revoke(&self, token: &str, now: DateTime<Utc>) -> Result<TokenView, Problem> {
        let mut slot = self.lock();
        let mut kept = slot.clone()?;
        let by_name = kept.iter().position(|kept| kept.name == token);
        let Some(at) = by_name.or_else(|| kept.iter().position(|kept| kept.id == token)) else {
            return Err(Problem::not_found(format!("there is no token {token}"))
                .hint("`lifeboat token list` shows names and ids"));
        };
        let gone = kept.remove(at);
        self.store(&mut slot, kept)?;
        Ok(gone.view(now))
    }

    /// Who shows `token`, if it is one of ours and has not ended.
    pub fn caller(&self, token: &str, now: DateTime<Utc>) -> Option<Caller> {
        let (id, secret) = token.strip_prefix(PREFIX)?.split_once('_')?;
        let secret = unhex::<SECRET_LEN>(secret)?;
        let slot = self.lock();
        let kept = slot.as_ref().ok()?.iter().find(|kept| kept.id == id && !kept.expired(now))?;
        // Hashes compare in constant time.
        let same = blake3::Hash::from_hex(&kept.hash).is_ok_and(|known| known == hash(&secret));
        same.then(|| Caller::Token {
            id: kept.id.clone(),
            name: kept.name.clone(),
            role: kept.role,
            machines: kept.machines.clone(),
        })
    }

    /// What cannot be stored is not believed either: a revoked token whose file could not be written stays, and the
    /// caller is told.
    fn store(&self, slot: &mut Result<Vec<Kept>, Problem>, kept: Vec<Kept>) -> Result<(), Problem> {
        let head = std::iter::once(Record::Tokens { version: VERSION });
        journal::replace(&self.path, head.chain(kept.iter().cloned().map(Record::Token)))
            .map_err(|error| Problem::failed("cannot keep the tokens", &error).hint("nothing was changed"))?;
        *slot = Ok(kept);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Result<Vec<Kept>, Problem>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(path: &std::path::Path) -> Result<Vec<Kept>, Problem> {
    let damaged = |why: &str| {
        Problem::new(Kind::Damage, format!("{} is damaged: {why}", path.display()))
            .hint("move it away and make new tokens; the old ones are worth nothing then")
    };
    let records = match journal::read_table::<Record>(path) {
        Ok(records) => records,
        Err(JournalError::Damaged { line, .. }) => return Err(damaged(&format!("line {line}"))),
        Err(error) => return Err(Problem::failed("cannot read the tokens", &error)),
    };
    let mut records = records.into_iter();
    match records.next() {
        None => return Ok(Vec::new()),
        Some(Record::Tokens { version: VERSION }) => {}
        Some(Record::Tokens { version }) => {
            return Err(Problem::refused(format!("{} is of version {version}", path.display()))
                .hint("a later version of Lifeboat wrote it; use that one"));
        }
        Some(Record::Token(_)) => return Err(damaged("it does not begin with its version")),
    }
    let kept = records.map(|record| match record {
        Record::Token(kept) => Ok(kept),
        Record::Tokens { .. } => Err(damaged("it begins twice")),
    });
    kept.collect()
}

fn check(request: &NewTokenRequest, now: DateTime<Utc>) -> Result<(), Problem> {
    check_name("token", &request.name)?;
    if request.expires.is_some_and(|expires| expires <= now) {
        return Err(Problem::usage("a token cannot end before it is made").hint("give a time that is to come"));
    }
    let Some(machines) = &request.machines else { return Ok(()) };
    if machines.is_empty() || machines.len() > MACHINES_MAX {
        return Err(Problem::usage(format!("a token is for all machines, or for 1 to {MACHINES_MAX} named ones")));
    }
    machines.iter().try_for_each(|machine| check_name("machine", machine))
}

fn random<const LEN: usize>() -> Result<[u8; LEN], Problem> {
    let mut bytes = [0; LEN];
    getrandom::fill(&mut bytes).map_err(|error| Problem::failed("the system has no random numbers", &error))?;
    Ok(bytes)
}

fn hash(secret: &[u8; SECRET_LEN]) -> blake3::Hash {
    blake3::Hasher::new_derive_key(CONTEXT).update(secret).finalize()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const LEN: usize>(text: &str) -> Option<[u8; LEN]> {
    if text.len() != 2 * LEN || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; LEN];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::TimeDelta;

    fn request(name: &str, role: Role) -> NewTokenRequest {
        NewTokenRequest { name: name.into(), role, machines: None, expires: None }
    }

    #[test]
    fn a_token_lets_in_until_it_is_revoked_also_after_a_reopen() {
        let dir = tempfile::tempdir().unwrap();
        let (path, now) = (dir.path().join("tokens"), Utc::now());
        let tokens = Tokens::open(path.clone());
        let made = tokens.create(request("ci", Role::Operator), now).unwrap();
        let other = tokens.create(request("grafana", Role::Viewer), now).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let secret = made.token.rsplit('_').next().unwrap();
        assert!(!text.contains(secret), "the secret is in the file");
        assert!(!format!("{made:?}").contains(secret), "the secret is in the debug form");
        let tokens = Tokens::open(path.clone());
        let caller = tokens.caller(&made.token, now).unwrap();
        assert!(caller.has(Role::Operator) && !caller.has(Role::Admin));
        assert_eq!(tokens.list(now).unwrap().len(), 2);
        assert_eq!(tokens.revoke("ci", now).unwrap().id, made.view.id);
        for tokens in [tokens, Tokens::open(path)] {
            assert_eq!(tokens.caller(&made.token, now), None);
            assert!(tokens.caller(&other.token, now).is_some());
        }
    }

    #[test]
    fn only_the_very_token_lets_in() {
        let dir = tempfile::tempdir().unwrap();
        let now = Utc::now();
        let tokens = Tokens::open(dir.path().join("tokens"));
        let token = tokens.create(request("ci", Role::Admin), now).unwrap().token;
        let other = tokens.create(request("other", Role::Admin), now).unwrap().token;
        for at in 0..token.len() {
            let mut changed = token.clone().into_bytes();
            changed[at] = if changed[at] == b'0' { b'1' } else { b'0' };
            let changed = String::from_utf8(changed).unwrap();
            assert_eq!(tokens.caller(&changed, now), None, "{changed}");
            assert_eq!(tokens.caller(&token[..at], now), None);
        }
        let (mixed, (_, secret)) = (token.rsplit_once('_').unwrap().0, other.rsplit_once('_').unwrap());
        assert_eq!(tokens.caller(&format!("{mixed}_{secret}"), now), None);
        assert_eq!(tokens.caller(&format!("{token}0"), now), None);
        assert_eq!(tokens.caller("lbt__é", now), None);
    }

    #[test]
    fn a_token_ends_at_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let now = Utc::now();
        let tokens = Tokens::open(dir.path().join("tokens"));
        let expires = now + TimeDelta::days(1);
        let made =
            tokens.create(NewTokenRequest { expires: Some(expires), ..request("ci", Role::Admin) }, now).unwrap();
        assert!(tokens.caller(&made.token, expires - TimeDelta::seconds(1)).is_some());
        assert_eq!(tokens.caller(&made.token, expires), None);
        assert!(tokens.list(expires).unwrap()[0].expired);
        let late = NewTokenRequest { expires: Some(now), ..request("late", Role::Admin) };
        assert_eq!(tokens.create(late, now).unwrap_err().kind, Kind::Usage);
    }

    #[test]
    fn names_and_machines_are_checked_and_names_are_unique() {
        let dir = tempfile::tempdir().unwrap();
        let now = Utc::now();
        let tokens = Tokens::open(dir.path().join("tokens"));
        tokens.create(request("ci", Role::Viewer), now).unwrap();
        assert_eq!(tokens.create(request("ci", Role::Viewer), now).unwrap_err().kind, Kind::Refused);
        assert_eq!(tokens.create(request("a b", Role::Viewer), now).unwrap_err().kind, Kind::Usage);
        for machines in [BTreeSet::new(), BTreeSet::from(["../x".to_owned()])] {
            let limited = NewTokenRequest { machines: Some(machines), ..request("x", Role::Viewer) };
            assert_eq!(tokens.create(limited, now).unwrap_err().kind, Kind::Usage);
        }
        assert_eq!(tokens.revoke("nobody", now).unwrap_err().kind, Kind::NotFound);
    }

    #[test]
    fn a_damaged_file_lets_nobody_in_and_is_not_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let (path, now) = (dir.path().join("tokens"), Utc::now());
        let token = Tokens::open(path.clone()).create(request("ci", Role::Admin), now).unwrap().token;
        let good = std::fs::read(&path).unwrap();
        for cut in 1..good.len() {
            std::fs::write(&path, &good[..cut]).unwrap();
            let tokens = Tokens::open(path.clone());
            // A cut between two lines is a table with less in it; replacing a file as a whole leaves none.
            let whole = good[cut - 1] == b'\n';
            assert_eq!(tokens.list(now).is_ok(), whole, "cut {cut}");
            assert_eq!(tokens.caller(&token, now), None, "cut {cut}");
            if !whole {
                assert_eq!(tokens.create(request("new", Role::Admin), now).unwrap_err().kind, Kind::Damage);
                assert_eq!(std::fs::read(&path).unwrap(), &good[..cut]);
            }
        }
        let mut bad = good.clone();
        bad[20] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        assert_eq!(Tokens::open(path).list(now).unwrap_err().kind, Kind::Damage);
    }
}
