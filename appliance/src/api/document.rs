//! `/openapi.json`: the API as an OpenAPI 3.1 document, made from the route table.
//!
//! Source: the OpenAPI Specification, version 3.1.1; its schemas are JSON Schema, draft 2020-12.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::Method;
use schemars::SchemaGenerator;
use schemars::generate::{Contract as Side, SchemaSettings};
use serde_json::{Map, Value, json};

use super::Shared;
use super::contract::{Answer, Part};
use super::table::{Need, Reach, Row};
use crate::app::App;
use crate::problem::Problem;

const PROBLEM: &str = "application/problem+json";
const SCHEMAS: &str = "/components/schemas";

pub(super) fn rows() -> Vec<Row<Arc<App>>> {
    vec![Row::get("/openapi.json", Need::Nobody, Reach::Whole, show).answers::<Map<String, Value>>("This document")]
}

async fn show(State(app): Shared) -> Json<Value> {
    Json(document(&super::rows(&app)))
}

/// The document of these operations.
fn document<S>(rows: &[Row<S>]) -> Value {
    let mut schemas = Schemas::new();
    let mut paths: Map<String, Value> = Map::new();
    for row in rows {
        let path = paths.entry(row.path).or_insert_with(|| json!({}));
        path[row.method.as_str().to_ascii_lowercase()] = operation(row, &mut schemas);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Lifeboat",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Boots virtual machines from their backups. What fails is an RFC 9457 problem document.",
        },
        "servers": [{ "url": "/" }],
        "paths": paths,
        "components": {
            "schemas": schemas.definitions(),
            "securitySchemes": { "token": { "type": "http", "scheme": "bearer" } },
        },
    })
}

fn operation<S>(row: &Row<S>, schemas: &mut Schemas) -> Value {
    let contract = &row.contract;
    let mut parameters = Vec::new();
    let mut operation = json!({ "operationId": id(row), "summary": contract.summary, "tags": [family(row.path)] });
    for part in &contract.takes {
        match part {
            Part::Nothing => {}
            Part::Path(describe) => {
                let names = row.path.split('/').filter_map(|word| word.strip_prefix('{')?.strip_suffix('}'));
                let schema = schemas.taken(*describe);
                parameters.extend(
                    names.map(|name| json!({ "name": name, "in": "path", "required": true, "schema": schema })),
                );
            }
            Part::Query(describe) => parameters.extend(queries(&schemas.taken(*describe))),
            Part::Header(name, about) => parameters.push(json!({
                "name": name, "in": "header", "required": false, "description": about, "schema": { "type": "string" },
            })),
            Part::Body(describe) => {
                let content = json!({ "application/json": { "schema": schemas.taken(*describe) } });
                operation["requestBody"] = json!({ "required": true, "content": content });
            }
        }
    }
    if row.method == Method::POST && row.need != Need::Nobody {
        parameters.push(json!({
            "name": "Idempotency-Key", "in": "header", "required": false,
            "description": "The same request with the same key is carried out once, and answered alike.",
            "schema": { "type": "string", "minLength": 1, "maxLength": 255 },
        }));
    }
    if let Need::Role(role) = row.need {
        operation["security"] = json!([{ "token": [] }]);
        operation["x-role"] = json!(role.name());
    }
    operation["parameters"] = json!(parameters);
    operation["responses"] = answers(&contract.answer, schemas);
    operation
}

/// What is answered: what the operation is for, or a problem.
fn answers(answer: &Answer, schemas: &mut Schemas) -> Value {
    let schema = answer.content.map_or(json!({}), |describe| json!({ "schema": schemas.given(describe) }));
    let mut good = json!({ "description": "Done, or begun", "content": { answer.media: schema } });
    if let Some(result) = answer.result {
        good["x-result"] = schemas.given(result);
    }
    let problem = schemas.given(SchemaGenerator::subschema_for::<Problem>);
    let problem = |why: &str| json!({ "description": why, "content": { PROBLEM: { "schema": problem } } });
    json!({
        answer.status.as_str(): good,
        "4XX": problem("The request cannot be carried out as it is"),
        "5XX": problem("It was right to ask, and failed"),
    })
}

/// The properties of an object as parameters behind the path.
fn queries(schema: &Value) -> Vec<Value> {
    let required = |name: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|one| one == name));
    let properties = schema["properties"].as_object().into_iter().flatten();
    let parameter = |(name, property): (&String, &Value)| json!({ "name": name, "in": "query", "required": required(name), "schema": without_null(property.clone()) });
    properties.map(parameter).collect()
}

/// A parameter that is not there is not null.
fn without_null(mut schema: Value) -> Value {
    if let Some(kinds) = schema["type"].as_array_mut() {
        kinds.retain(|kind| kind != "null");
        if let [kind] = kinds.as_slice() {
            schema["type"] = kind.clone();
        }
    }
    if let Some(choices) = schema.get_mut("anyOf").and_then(Value::as_array_mut) {
        choices.retain(|choice| choice["type"] != "null");
    }
    if let Some(plain) = schema.as_object_mut() {
        plain.retain(|_, value| !value.is_null());
    }
    schema
}

/// `getRecoveriesName`, say.
fn id<S>(row: &Row<S>) -> String {
    let path = row.path.trim_start_matches("/api/v1");
    let words = path.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let mut id = row.method.as_str().to_ascii_lowercase();
    for word in words {
        id.push_str(&word[..1].to_ascii_uppercase());
        id.push_str(&word[1..]);
    }
    id
}

fn family(path: &str) -> &str {
    path.trim_start_matches("/api/v1/").trim_start_matches('/').split('/').next().unwrap_or_default()
}

/// Schemas of what is taken stand where they are used; those of what is given have names. A type that is both has two,
/// since a field may be left out of a request that is in every answer.
struct Schemas {
    taken: SchemaGenerator,
    given: SchemaGenerator,
}

impl Schemas {
    fn new() -> Schemas {
        let settings = |side| {
            SchemaSettings::draft2020_12().with(|settings| {
                settings.definitions_path = SCHEMAS.into();
                settings.meta_schema = None;
                settings.inline_subschemas = side == Side::Deserialize;
                settings.contract = side;
            })
        };
        let generator = |side: Side| settings(side).into_generator();
        Schemas { taken: generator(Side::Deserialize), given: generator(Side::Serialize) }
    }

    fn taken(&mut self, describe: super::contract::Describe) -> Value {
        describe(&mut self.taken).to_value()
    }

    fn given(&mut self, describe: super::contract::Describe) -> Value {
        describe(&mut self.given).to_value()
    }

    fn definitions(&mut self) -> Map<String, Value> {
        self.given.take_definitions(true)
    }
}

#[cfg(test)]
#[path = "document_tests.rs"]
mod tests;
