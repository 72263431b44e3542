//! Who may do what through the API: roles, callers, [`tokens`], and the [`throttle`] on failed logins.
//!
//! Whoever reaches the state folder's socket is the owner, who may do everything: the file system decides that. Over the
//! network a caller is whom a token makes him. What a route needs is in its row of the route table (`api::table`).

pub mod throttle;
pub mod tokens;

use std::collections::BTreeSet;

use axum::extract::FromRequestParts;
use axum::http::StatusCode;
use axum::http::request::Parts;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problem::Problem;

/// What a token may do; each role may do all that the ones before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Look: lists, states, metrics. No content of disks.
    Viewer,
    /// Back up, recover, read disks and files, restore: trusted with the data, and with files of the host.
    Operator,
    /// Drop points, free space, change keys and tokens.
    Admin,
}

impl Role {
    /// Its name, as it is written everywhere.
    pub fn name(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        }
    }
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// Whoever may open the state folder's socket.
    Owner,
    /// A policy of the configuration, which is the owner's.
    Policy(String),
    /// Who has shown a token.
    Token {
        /// The token's id.
        id: String,
        /// The token's name.
        name: String,
        /// What it may do.
        role: Role,
        /// The only machines it may do it to; all if absent.
        machines: Option<BTreeSet<String>>,
    },
}

impl Caller {
    /// Whether he may do what needs `role`.
    pub fn has(&self, role: Role) -> bool {
        match self {
            Caller::Owner | Caller::Policy(_) => true,
            Caller::Token { role: own, .. } => *own >= role,
        }
    }

    /// Whether he may use everything, not only some machines.
    pub fn is_unlimited(&self) -> bool {
        matches!(self, Caller::Owner | Caller::Policy(_) | Caller::Token { machines: None, .. })
    }

    /// Whether he may see `machine`.
    pub fn sees(&self, machine: &str) -> bool {
        match self {
            Caller::Owner | Caller::Policy(_) | Caller::Token { machines: None, .. } => true,
            Caller::Token { machines: Some(machines), .. } => machines.contains(machine),
        }
    }

    /// Whether he may see what belongs to `machine`, or to no machine.
    pub fn sees_any(&self, machine: Option<&str>) -> bool {
        machine.map_or(self.is_unlimited(), |machine| self.sees(machine))
    }
}

impl std::fmt::Display for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Caller::Owner => f.write_str("owner"),
            Caller::Policy(name) => write!(f, "policy {name}"),
            Caller::Token { id, name, .. } => write!(f, "token {name} ({id})"),
        }
    }
}

tokio::task_local! {
    static ORIGIN: Origin;
}

/// Where the request comes from that is being answered, for what it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Who asks.
    pub who: String,
    /// The request's key, if it is not to be carried out twice.
    pub key: Option<String>,
}

impl Origin {
    /// Answers with this origin.
    pub fn scope<F: Future>(self, answer: F) -> impl Future<Output = F::Output> {
        ORIGIN.scope(self, answer)
    }

    /// The one of the request that is being answered; the owner's where there is none.
    pub fn current() -> Origin {
        ORIGIN.try_with(Clone::clone).unwrap_or_else(|_| Origin { who: Caller::Owner.to_string(), key: None })
    }
}

/// Who has not shown who he is.
pub fn unknown_caller() -> Problem {
    Problem::refused("this needs a token")
        .hint("send `Authorization: Bearer TOKEN`; `lifeboat token create` makes one")
        .with_status(StatusCode::UNAUTHORIZED)
}

/// Who may not do this.
pub fn forbidden(why: impl Into<String>) -> Problem {
    Problem::refused(why).with_status(StatusCode::FORBIDDEN)
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Caller, Problem> {
        parts.extensions.get::<Caller>().cloned().ok_or_else(unknown_caller)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_may_do_all_that_the_smaller_ones_may() {
        let caller = |role| Caller::Token { id: "1".into(), name: "n".into(), role, machines: None };
        let roles = [Role::Viewer, Role::Operator, Role::Admin];
        for (rank, own) in roles.into_iter().enumerate() {
            let may: Vec<bool> = roles.into_iter().map(|needed| caller(own).has(needed)).collect();
            assert_eq!(may, (0..3).map(|needed| needed <= rank).collect::<Vec<_>>(), "{own:?}");
        }
        assert!(roles.into_iter().all(|needed| Caller::Owner.has(needed)));
    }

    #[test]
    fn who_is_limited_to_machines_sees_only_them() {
        let machines = Some(BTreeSet::from(["web01".to_owned()]));
        let caller = Caller::Token { id: "1".into(), name: "n".into(), role: Role::Admin, machines };
        assert!(caller.sees("web01") && !caller.sees("db01") && !caller.is_unlimited());
        assert!(caller.sees_any(Some("web01")) && !caller.sees_any(None));
        assert!(Caller::Owner.sees("db01") && Caller::Owner.sees_any(None));
    }
}
