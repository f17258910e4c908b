//! The JSON Schema of a specification.
//!
//! Owns what the derived schema of the raw types cannot say by itself: a key that is there has a value (no null), and `method` is another word for `op`.

use schemars::transform::{RecursiveTransform, Transform};
use schemars::{Schema, schema_for};
use serde_json::{Value, json};

use super::Document;
use crate::op::OpSet;

/// The JSON Schema of a specification, as checked in at `docs/experiment.schema.json`.
#[must_use]
pub fn schema() -> String {
    let mut schema = schema_for!(Document);
    RecursiveTransform(without_null).transform(&mut schema);
    if let Some(rule) = schema
        .pointer_mut("/$defs/RuleSpec/properties")
        .and_then(Value::as_object_mut)
    {
        if let Some(op) = rule.get_mut("op").and_then(Value::as_object_mut) {
            op.insert("examples".into(), json!(OpSet::words().collect::<Vec<_>>()));
        }
        let op = rule.get("op").cloned().unwrap_or_default();
        rule.insert("method".into(), op);
    }
    // Printing a value of strings and numbers cannot fail.
    let mut text = serde_json::to_string_pretty(&schema).unwrap_or_default();
    text.push('\n');
    text
}

/// An optional key may be left out; it may not be null.
fn without_null(schema: &mut Schema) {
    let null = json!({"type": "null"});
    if let Some(Value::Array(types)) = schema.get_mut("type") {
        types.retain(|name| name != "null");
        if let [only] = types.as_slice() {
            let only = only.clone();
            schema.insert("type".into(), only);
        }
    }
    if let Some(Value::Array(choices)) = schema.get_mut("anyOf") {
        choices.retain(|choice| *choice != null);
        if let [Value::Object(only)] = choices.as_slice() {
            let only = only.clone();
            schema.remove("anyOf");
            for (key, value) in only {
                schema.insert(key, value);
            }
        }
    }
}
