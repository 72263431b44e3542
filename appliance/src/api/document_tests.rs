//! The document: whole in itself, and true. Whatever is asked, by the document or against it, is answered as it says.

use std::collections::BTreeSet;

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use serde_json::{Map, Value, json};
use tower::ServiceExt;

use super::*;
use crate::api::table::tests::Bench;

/// Requests for each operation.
const ROUNDS: usize = 40;

/// Every schema that is referred to.
fn references(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            if let Some(Value::String(reference)) = object.get("$ref") {
                found.insert(reference.clone());
            }
            object.values().for_each(|value| references(value, found));
        }
        Value::Array(all) => all.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

#[tokio::test]
async fn the_document_names_every_operation_once_and_is_whole() {
    let bench = Bench::new().await;
    let rows = bench.rows();
    let document = document(&rows);
    let mut ids = BTreeSet::new();
    for row in &rows {
        let operation = &document["paths"][row.path][row.method.as_str().to_ascii_lowercase()];
        let named = format!("{} {}", row.method, row.path);
        assert!(ids.insert(operation["operationId"].as_str().unwrap().to_owned()), "{named}: {operation}");
        assert!(!operation["summary"].as_str().unwrap().is_empty(), "{named}");
        assert_eq!(operation.get("security").is_some(), row.need != Need::Nobody, "{named}");
        let parameters = operation["parameters"].as_array().unwrap();
        let in_path = parameters.iter().filter(|parameter| parameter["in"] == "path").count();
        assert_eq!(in_path, row.path.matches('{').count(), "{named}");
    }
    let mut found = BTreeSet::new();
    references(&document, &mut found);
    assert!(found.len() > 30, "{found:?}");
    for reference in found {
        assert!(document.pointer(reference.trim_start_matches('#')).is_some(), "{reference} leads nowhere");
    }
}

/// Numbers that look random, always the same for a seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % bound.max(1)
    }

    fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    fn word(&mut self) -> String {
        let words =
            ["", "a", "web01", "-1", "../..", "/nowhere/at/all", "a b", "0", "nbd://[::1]:1/x", "ü\u{0}\n", "%"];
        match self.below(4) {
            0 => "x".repeat(1 << self.below(14)),
            _ => (*self.pick(&words)).to_owned(),
        }
    }

    /// Anything.
    fn any(&mut self) -> Value {
        match self.below(7) {
            0 => Value::Null,
            1 => json!(self.below(2) == 0),
            2 => json!(*self.pick(&[0, -1, 1, i64::MAX, i64::MIN])),
            3 => json!(0.5),
            4 => json!([self.word()]),
            5 => json!({ self.word(): self.word() }),
            _ => json!(self.word()),
        }
    }

    /// Something that the schema allows, or now and then something else.
    fn value(&mut self, schema: &Value) -> Value {
        if self.below(12) == 0 {
            return self.any();
        }
        for choices in ["anyOf", "oneOf"] {
            if let Some(choices) = schema[choices].as_array() {
                let choice = self.pick(choices).clone();
                return self.value(&choice);
            }
        }
        if let Some(values) = schema["enum"].as_array() {
            return self.pick(values).clone();
        }
        if let Some(value) = schema.get("const") {
            return value.clone();
        }
        let kind = match &schema["type"] {
            Value::Array(kinds) => self.pick(kinds).clone(),
            kind => kind.clone(),
        };
        match kind.as_str() {
            Some("null") => Value::Null,
            Some("boolean") => json!(self.below(2) == 0),
            Some("integer") => json!(*self.pick(&[0, 1, 2, 7, 255, 65536, i64::MAX])),
            Some("number") => json!(*self.pick(&[0.0, 0.5, 1e300])),
            Some("array") => (0..self.below(4)).map(|_| self.value(&schema["items"])).collect(),
            Some("object") => self.object(schema),
            Some("string") => json!(self.word()),
            _ => self.any(),
        }
    }

    fn object(&mut self, schema: &Value) -> Value {
        let required = schema["required"].as_array().cloned().unwrap_or_default();
        let mut object = Map::new();
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let wanted = required.iter().any(|one| one == name);
            if self.below(if wanted { 30 } else { 2 }) != 0 {
                object.insert(name.clone(), self.value(property));
            }
        }
        if schema["additionalProperties"].is_object() && self.below(2) == 0 {
            object.insert(self.word(), self.value(&schema["additionalProperties"]));
        }
        Value::Object(object)
    }

    /// A path with its parameters, and the parameters behind it.
    fn uri(&mut self, path: &str, operation: &Value) -> String {
        let (mut uri, mut query) = (path.to_owned(), Vec::new());
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let name = parameter["name"].as_str().unwrap();
            let text = match self.value(&parameter["schema"]) {
                Value::String(text) => text,
                other => other.to_string(),
            };
            // What exists makes for more answers than what does not.
            let text = if self.below(2) == 0 { (*self.pick(&["theirs", "1"])).to_owned() } else { text };
            let escaped: String = text.bytes().map(|byte| format!("%{byte:02X}")).collect();
            match parameter["in"].as_str() {
                Some("path") => uri = uri.replace(&format!("{{{name}}}"), &escaped),
                Some("query") if self.below(2) == 0 => query.push(format!("{name}={escaped}")),
                _ => {}
            }
        }
        if query.is_empty() { uri } else { format!("{uri}?{}", query.join("&")) }
    }
}

/// What the document says of this answer: of the status itself, or of all like it.
fn documented(operation: &Value, status: StatusCode) -> Option<&Value> {
    let responses = &operation["responses"];
    responses.get(status.as_str()).or_else(|| responses.get(format!("{}XX", status.as_u16() / 100)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_asked_is_answered_as_the_document_says() {
    let seed = std::env::var("LIFEBOAT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand_seed);
    let mut dice = Dice(seed);
    let bench = Bench::new().await;
    let document = document(&bench.rows());
    let mut good = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            for _ in 0..ROUNDS {
                let uri = dice.uri(path, operation);
                let mut request = Request::builder().method(method.to_uppercase().as_str()).uri(&uri);
                let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
                let sent = match schema.is_null() {
                    true => String::new(),
                    false => dice.value(schema).to_string(),
                };
                if !sent.is_empty() {
                    request = request.header(header::CONTENT_TYPE, "application/json");
                }
                let request = request.body(Body::from(sent.clone())).unwrap();
                let response = crate::api::owners(&bench.app).oneshot(request).await.unwrap();
                let status = response.status();
                let asked = format!("LIFEBOAT_SEED={seed}: {method} {uri} {sent}: {status}");
                assert!(!status.is_server_error(), "{asked}");
                let media =
                    response.headers().get(header::CONTENT_TYPE).map(|media| media.to_str().unwrap().to_owned());
                let said = documented(operation, status).unwrap_or_else(|| panic!("{asked} is not documented"));
                let media = media.unwrap_or_else(|| panic!("{asked} has no media type"));
                let content = said["content"].get(&media).unwrap_or_else(|| panic!("{asked} with {media}"));
                if status.is_success() {
                    good.insert(format!("{method} {path}"));
                }
                let Some(schema) = content.get("schema") else { continue };
                let body = axum::body::to_bytes(response.into_body(), 16 << 20).await.unwrap();
                let body: Value = serde_json::from_slice(&body).unwrap_or_else(|error| panic!("{asked}: {error}"));
                // Some content is whatever a guest's description says.
                let Some(mut schema) = Some(schema.clone()).filter(Value::is_object) else { continue };
                schema["components"] = document["components"].clone();
                if let Err(error) = jsonschema::validate(&schema, &body) {
                    panic!("{asked} {body}: {error} at {}", error.instance_path());
                }
            }
        }
    }
    assert!(good.len() > 15, "LIFEBOAT_SEED={seed}: next to nothing was answered well: {good:?}");
}

fn rand_seed() -> u64 {
    getrandom::u64().unwrap()
}
