//! ● A table that the source has written anew: whether its rows are others than the same command gives here.
//!
//! No change of such rows is sent. What [`crate::shape`] calls `missing` is no rewriting: the rows are as they were.

use serde_json::Value;

use crate::shape::is_certain_cast;

/// `pg_event_trigger_table_rewrite_reason()`: a column with a value for each row came.
const NEW_COLUMN: i32 = 2;

/// The same: a column has another type.
const NEW_TYPE: i32 = 4;

/// Whether rows are others than here, by what the table is there now and here before.
pub(super) fn changes_rows(reason: i32, recorded: &Value, found: &Value) -> bool {
    let (now, before) = (columns(recorded), columns(found));
    let was = |column: &Value| {
        before
            .iter()
            .find(|one| one.get("name") == column.get("name"))
            .cloned()
    };
    now.iter().any(|column| match was(column) {
        // What a generated column has is computed here, too.
        None => {
            reason & NEW_COLUMN != 0
                && column.get("generated").is_none()
                && (column.get("default").is_some() || column.get("identity").is_some())
        }
        Some(was) => {
            let types = (text(&was, "type"), text(column, "type"));
            reason & NEW_TYPE != 0 && types.0 != types.1 && !is_certain_cast(types.0, types.1)
        }
    })
}

fn columns(shape: &Value) -> Vec<Value> {
    shape
        .get("columns")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default()
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rows_are_others_where_each_has_a_value_of_its_own_or_was_cast() {
        let a = |of: &str| json!({"columns": [{"name": "a", "type": of}]});
        let with = |b: Value| json!({"columns": [{"name": "a", "type": "integer"}, b]});
        let table = [
            (
                2,
                with(json!({"name": "b", "type": "uuid", "default": "random()"})),
                a("integer"),
                true,
            ),
            (
                2,
                with(json!({"name": "b", "type": "integer", "identity": "a"})),
                a("integer"),
                true,
            ),
            (
                2,
                with(json!({"name": "b", "type": "integer", "generated": "s", "default": "a"})),
                a("integer"),
                false,
            ),
            (4, a("bigint"), a("integer"), false),
            (4, a("text"), a("character varying(10)"), false),
            (
                4,
                a("timestamp with time zone"),
                a("timestamp without time zone"),
                true,
            ),
            (4, a("date"), a("text"), true),
            (1, a("integer"), a("integer"), false),
        ];
        for (reason, recorded, found, expected) in table {
            assert_eq!(
                changes_rows(reason, &recorded, &found),
                expected,
                "{recorded}"
            );
        }
    }
}
