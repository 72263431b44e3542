//! `token`.

use std::collections::BTreeSet;

use axum::http::Method;
use chrono::{DateTime, TimeDelta, Utc};

use super::args::{CreateToken, Global, RevokeToken, RoleArg, Token};
use super::client::segment;
use super::collect::parse_duration;
use super::connect::{Door, NOTHING};
use super::render;
use crate::access::Role;
use crate::access::tokens::{NewToken, NewTokenRequest, TokenView};
use crate::forget::parse_until;
use crate::problem::Problem;

const PATH: &str = "/api/v1/tokens";

/// An end: so many seconds from now, or at a time.
#[derive(Debug, Clone, Copy)]
pub enum End {
    After(u64),
    At(DateTime<Utc>),
}

pub fn parse_end(text: &str) -> Result<End, String> {
    parse_duration(text).map(End::After).or_else(|_| parse_until(text).map(End::At)).map_err(|_| {
        format!("`{text}` is neither a duration nor a date; write 90d, 2027-01-31 (its end) or 2027-01-31T03:00:00Z")
    })
}

impl End {
    fn time(self, now: DateTime<Utc>) -> Result<DateTime<Utc>, Problem> {
        let end = match self {
            End::At(time) => Some(time),
            End::After(seconds) => i64::try_from(seconds)
                .ok()
                .and_then(TimeDelta::try_seconds)
                .and_then(|delta| now.checked_add_signed(delta)),
        };
        end.ok_or_else(|| Problem::usage("this is too long a life for a token").hint("leave --expires out for no end"))
    }
}

pub async fn run(door: &Door, global: &Global, command: &Token) -> Result<(), Problem> {
    match command {
        Token::Create(args) => create(door, global, args).await,
        Token::List => list(door, global).await,
        Token::Revoke(args) => revoke(door, global, args).await,
    }
}

async fn create(door: &Door, global: &Global, args: &CreateToken) -> Result<(), Problem> {
    let role = match args.role {
        RoleArg::Viewer => Role::Viewer,
        RoleArg::Operator => Role::Operator,
        RoleArg::Admin => Role::Admin,
    };
    let request = NewTokenRequest {
        name: args.name.clone(),
        role,
        machines: (!args.machine.is_empty()).then(|| args.machine.iter().cloned().collect::<BTreeSet<_>>()),
        expires: args.expires.map(|end| end.time(Utc::now())).transpose()?,
    };
    let made: NewToken = door.client.call(Method::POST, PATH, Some(&request)).await?;
    if global.json {
        render::json(&made);
        return Ok(());
    }
    // The token alone is the answer, so that it can be piped into a file.
    render::line(&made.token);
    render::note(&format!("token {} of {}: keep it, it is not shown again", made.view.name, described(&made.view)));
    Ok(())
}

fn described(token: &TokenView) -> String {
    let end = token.expires.map_or("until it is revoked".to_owned(), |time| format!("until {}", render::time(time)));
    format!("role {} for {}, {end}", token.role.name(), machines(token))
}

fn machines(token: &TokenView) -> String {
    match &token.machines {
        None => "all machines".to_owned(),
        Some(machines) => machines.iter().map(String::as_str).collect::<Vec<_>>().join(", "),
    }
}

async fn list(door: &Door, global: &Global) -> Result<(), Problem> {
    let tokens: Vec<TokenView> = door.client.call(Method::GET, PATH, NOTHING).await?;
    if global.json {
        render::json(&tokens);
        return Ok(());
    }
    let row = |token: &TokenView| {
        let end = token.expires.map_or("-".to_owned(), render::time);
        vec![
            token.id.clone(),
            token.name.clone(),
            token.role.name().to_owned(),
            machines(token),
            render::time(token.created),
            if token.expired { format!("{end} (ended)") } else { end },
        ]
    };
    let head = ["TOKEN", "NAME", "ROLE", "MACHINES", "CREATED", "EXPIRES"];
    render::table(&head, &tokens.iter().map(row).collect::<Vec<_>>(), &[]);
    Ok(())
}

async fn revoke(door: &Door, global: &Global, args: &RevokeToken) -> Result<(), Problem> {
    let path = format!("{PATH}/{}", segment(&args.token));
    let gone: TokenView = door.client.call(Method::DELETE, &path, NOTHING).await?;
    if global.json {
        render::json(&gone);
    } else {
        render::line(&format!("revoked token {} ({})", gone.name, gone.id));
    }
    Ok(())
}
