//! ● What may be repeated of a data exception (class 22): everything but the value.
//!
//! Pure. PostgreSQL puts the value at the end (`invalid input syntax for type integer: "x"`) or in front (`value "x" is out
//! of range for type integer`). Only texts that are known are repeated, and only up to where a value begins: a server that
//! speaks another language, or a function of somebody's own, may put one anywhere.

/// Beginnings of PostgreSQL's own messages that say more than a value. From `ERRCODE_` of class 22 in `src/backend/utils`.
const KNOWN: &[&str] = &[
    "invalid input syntax for type ",
    "invalid input value for enum ",
    "invalid value for ",
    "value too long for type ",
    "value out of range: ",
    "numeric field overflow",
    "integer out of range",
    "bigint out of range",
    "smallint out of range",
    "interval out of range",
    "date out of range",
    "timestamp out of range",
    "interval field value out of range",
    "date/time field value out of range",
    "division by zero",
    "malformed array literal",
    "malformed record literal",
    "malformed range literal",
    "malformed multirange literal",
    "range lower bound must be less than or equal to range upper bound",
    "bit string length ",
    "bit string too long for type ",
    "invalid byte sequence for encoding ",
    "unsupported Unicode escape sequence",
    "time zone displacement out of range",
    "invalid XML ",
    "incorrect binary data format",
    "insufficient data left in message",
    "invalid memory alloc request size",
    "string is too long for tsvector",
    "null value not allowed",
    "cannot cast jsonb ",
];

/// What stands behind the value where that comes first.
const BEHIND: &[&str] = &[" is out of range for type ", " is out of range"];

/// What the conditions of class 22 that users meet are called, whatever language the message is in; PostgreSQL documentation,
/// appendix "PostgreSQL Error Codes".
const CONDITIONS: &[(&str, &str)] = &[
    ("22000", "data exception"),
    ("22001", "it is too long for its type"),
    ("22003", "it is out of range for its type"),
    ("22004", "a null value is not allowed"),
    ("22007", "it is no date or time"),
    ("22008", "it is out of range for a date or time"),
    ("22012", "division by zero"),
    ("22021", "its bytes are not valid in the encoding"),
    ("22023", "a parameter has no valid value"),
    ("22026", "its length is not that of its type"),
    ("2200M", "it is no XML document"),
    ("2200N", "it is no XML content"),
    ("22P02", "it is not written as its type wants it"),
    ("22P03", "its binary form is not that of its type"),
    ("22P05", "a character is not in the encoding"),
];

/// What a condition is called.
pub(super) fn condition(sqlstate: &str) -> Option<&'static str> {
    let found = CONDITIONS.iter().find(|(state, _)| *state == sqlstate);
    found.map(|(_, name)| *name)
}

/// The message without a value, if it is one that is known.
pub(super) fn without_value(message: &str) -> Option<String> {
    if message.starts_with("value \"") {
        return BEHIND.iter().find_map(|behind| {
            let (_, rest) = message.rsplit_once(behind)?;
            let is_name = |c: char| c.is_ascii_alphanumeric() || " _()".contains(c);
            rest.chars()
                .all(is_name)
                .then(|| format!("a value{behind}{rest}"))
        });
    }
    let known = KNOWN.iter().any(|known| message.starts_with(known));
    known.then(|| {
        let end = message.find(['"', ':']).unwrap_or(message.len());
        message[..end].trim_end().to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_repeated_up_to_its_value() {
        for (message, expected) in [
            (
                "invalid input value for enum mood: \"x\"",
                Some("invalid input value for enum mood"),
            ),
            (
                "invalid input value for enum public.mood: \"a: \"b\"",
                Some("invalid input value for enum public.mood"),
            ),
            (
                "invalid input syntax for type integer: \"12\"",
                Some("invalid input syntax for type integer"),
            ),
            (
                "value \"99\" is out of range for type smallint",
                Some("a value is out of range for type smallint"),
            ),
            (
                "value \"a is out of range for type x\" is out of range for type bigint",
                Some("a value is out of range for type bigint"),
            ),
            (
                "value too long for type character varying(5)",
                Some("value too long for type character varying(5)"),
            ),
            ("numeric field overflow", Some("numeric field overflow")),
            (
                "invalid byte sequence for encoding \"UTF8\": 0xff",
                Some("invalid byte sequence for encoding"),
            ),
            (
                "date/time field value out of range: \"2024-13-45\"",
                Some("date/time field value out of range"),
            ),
            ("ungültige Eingabesyntax für Typ integer: »12«", None),
            ("somebody's own: 4711", None),
        ] {
            assert_eq!(without_value(message).as_deref(), expected, "{message}");
        }
    }
}
