//! What went wrong, as a person and a program read it: an RFC 9457 problem document that crosses the API unchanged,
//! with the exit status of the command line.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::audit::About;

/// What kind of failure it is; one exit status and one HTTP status each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The operation was right to ask for and failed.
    Failed,
    /// The request makes no sense.
    Usage,
    /// Stored data is damaged.
    Damage,
    /// The named object does not exist.
    NotFound,
    /// Refused, or in use by somebody else.
    Refused,
}

impl Kind {
    /// Exit status of the command line.
    pub fn exit_status(self) -> u8 {
        match self {
            Kind::Failed => 1,
            Kind::Usage => 2,
            Kind::Damage => 3,
            Kind::NotFound => 4,
            Kind::Refused => 5,
        }
    }

    fn http_status(self) -> StatusCode {
        match self {
            Kind::Failed | Kind::Damage => StatusCode::INTERNAL_SERVER_ERROR,
            Kind::Usage => StatusCode::BAD_REQUEST,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::Refused => StatusCode::CONFLICT,
        }
    }
}

/// A failure with its causes and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// What failed, on which object.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// Why, outermost cause first, joined by `: `.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// What to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// What kind of failure it is.
    pub kind: Kind,
    /// How the asker has to go on with it.
    #[serde(skip)]
    pub handling: Handling,
}

/// How the command line goes on with a problem. It does not cross the API.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Handling {
    /// It is told to the user.
    #[default]
    Tell,
    /// The answer on standard output has told it to programs already.
    AnswerTold,
    /// Nobody has taken the request; it can be asked again soon.
    AskAgain,
}

impl Problem {
    /// A problem without a cause.
    pub fn new(kind: Kind, title: impl Into<String>) -> Problem {
        Problem {
            title: title.into(),
            status: kind.http_status().as_u16(),
            detail: None,
            hint: None,
            kind,
            handling: Handling::Tell,
        }
    }

    /// A problem whose causes are `error` and its sources.
    pub fn because(kind: Kind, title: impl Into<String>, error: &(dyn std::error::Error + 'static)) -> Problem {
        Problem { detail: Some(chain(error)), ..Problem::new(kind, title) }
    }

    /// The same, with what to do.
    pub fn hint(self, hint: impl Into<String>) -> Problem {
        Problem { hint: Some(hint.into()), ..self }
    }

    /// The same, handled otherwise.
    pub fn handled(self, handling: Handling) -> Problem {
        Problem { handling, ..self }
    }

    /// The same, of another kind.
    pub fn with_kind(self, kind: Kind) -> Problem {
        Problem { kind, status: kind.http_status().as_u16(), ..self }
    }

    /// The request makes no sense.
    pub fn usage(title: impl Into<String>) -> Problem {
        Problem::new(Kind::Usage, title)
    }

    /// The named object does not exist.
    pub fn not_found(title: impl Into<String>) -> Problem {
        Problem::new(Kind::NotFound, title)
    }

    /// Refused, or in use.
    pub fn refused(title: impl Into<String>) -> Problem {
        Problem::new(Kind::Refused, title)
    }

    /// The same, with an HTTP status of its own.
    pub fn with_status(self, status: StatusCode) -> Problem {
        Problem { status: status.as_u16(), ..self }
    }

    /// Failed because of `error`.
    pub fn failed(title: impl Into<String>, error: &(dyn std::error::Error + 'static)) -> Problem {
        Problem::because(Kind::Failed, title, error)
    }
}

/// An error and its sources on one line. A source that its parent already quotes is not said twice.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.title)?;
        if let Some(detail) = &self.detail {
            write!(f, ": {detail}")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problem {}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(self.kind.http_status());
        let about = About(self.title.clone());
        let mut response = (status, Json(self)).into_response();
        response.extensions_mut().insert(about);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_reads_as_what_why_and_what_to_do() {
        let cause = std::io::Error::other("disk on fire");
        let problem = Problem::failed("cannot back up machine web01", &cause).hint("replace the disk");
        assert_eq!(problem.to_string(), "cannot back up machine web01: disk on fire\nhint: replace the disk");
        let json = serde_json::to_string(&problem).unwrap();
        assert_eq!(serde_json::from_str::<Problem>(&json).unwrap(), problem);
    }

    #[test]
    fn every_kind_has_the_exit_status_of_the_contract() {
        let statuses = [Kind::Failed, Kind::Usage, Kind::Damage, Kind::NotFound, Kind::Refused].map(Kind::exit_status);
        assert_eq!(statuses, [1, 2, 3, 4, 5]);
    }
}
