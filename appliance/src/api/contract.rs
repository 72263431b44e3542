//! What an operation takes and answers. What it takes is told by the types of its handler's arguments, so that the
//! document cannot say anything else.

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::extract::{Body, LAST_EVENT, LastEvent, Path, Query};
use crate::access::Caller;
use crate::jobs::JobView;

/// JSON.
pub const JSON: &str = "application/json";
/// JSON values, one a line.
pub const LINES: &str = "application/x-ndjson";
/// Server-sent events.
pub const EVENTS: &str = "text/event-stream";
/// Text.
pub const TEXT: &str = "text/plain; charset=utf-8";
/// A picture.
pub const PNG: &str = "image/png";
/// An archive.
pub const TAR: &str = "application/x-tar";
/// Metrics for Prometheus.
pub const METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Makes the schema of a type; types that have a name go into the generator's definitions.
pub type Describe = fn(&mut SchemaGenerator) -> Schema;

/// A part of a request.
#[derive(Debug, Clone, Copy)]
pub enum Part {
    /// Nothing of the request itself.
    Nothing,
    /// The parameter in the path.
    Path(Describe),
    /// An object whose properties are the parameters behind the path.
    Query(Describe),
    /// A header that may be there: its name, and what it says.
    Header(&'static str, &'static str),
    /// The body, in JSON.
    Body(Describe),
}

/// An argument of a handler.
pub trait Argument {
    /// What it takes of the request.
    const PART: Part;
}

impl<S> Argument for State<S> {
    const PART: Part = Part::Nothing;
}

impl Argument for LastEvent {
    const PART: Part = Part::Header(LAST_EVENT, "The id of the last event that came, to be told of what was missed.");
}

impl Argument for Caller {
    const PART: Part = Part::Nothing;
}

impl Argument for Option<Extension<Caller>> {
    const PART: Part = Part::Nothing;
}

impl<T: JsonSchema> Argument for Path<T> {
    const PART: Part = Part::Path(SchemaGenerator::subschema_for::<T>);
}

impl<T: JsonSchema> Argument for Query<T> {
    const PART: Part = Part::Query(SchemaGenerator::subschema_for::<T>);
}

impl<T: JsonSchema> Argument for Body<T> {
    const PART: Part = Part::Body(SchemaGenerator::subschema_for::<T>);
}

/// All arguments of a handler, as [`axum::handler::Handler`] has them: behind a marker.
pub trait Takes {
    /// What they take.
    fn parts() -> Vec<Part>;
}

macro_rules! takes {
    ($($argument:ident),*) => {
        impl<Marker, $($argument: Argument),*> Takes for (Marker, $($argument,)*) {
            fn parts() -> Vec<Part> {
                vec![$($argument::PART),*]
            }
        }
    };
}

takes!();
takes!(A);
takes!(A, B);
takes!(A, B, C);
takes!(A, B, C, D);

/// What is answered when all is well.
#[derive(Debug, Clone, Copy)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The media type.
    pub media: &'static str,
    /// The content, if it is JSON.
    pub content: Option<Describe>,
    /// What a job that is answered will have as its result.
    pub result: Option<Describe>,
}

impl Answer {
    pub(super) fn json<T: JsonSchema>(status: StatusCode) -> Answer {
        let content = Some(SchemaGenerator::subschema_for::<T> as Describe);
        Answer { status, media: JSON, content, result: None }
    }

    pub(super) fn job<T: JsonSchema>() -> Answer {
        let result = Some(SchemaGenerator::subschema_for::<T> as Describe);
        Answer { result, ..Answer::json::<JobView>(StatusCode::ACCEPTED) }
    }

    pub(super) fn other(media: &'static str) -> Answer {
        Answer { status: StatusCode::OK, media, content: None, result: None }
    }
}

/// What an operation takes and answers, and what it does in a line.
#[derive(Debug, Clone)]
pub struct Contract {
    /// What it does.
    pub summary: &'static str,
    /// What it takes.
    pub takes: Vec<Part>,
    /// What it answers.
    pub answer: Answer,
}
