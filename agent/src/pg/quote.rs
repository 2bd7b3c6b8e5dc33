//! ● Names and literals in SQL text.
//!
//! # What it does not do
//! It knows no encodings: names come and go as the server sends them.

/// Quotes an identifier for SQL, always.
pub fn quote_ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Quotes a string literal for SQL, whatever `standard_conforming_strings` says.
pub fn quote_literal(text: &str) -> String {
    let doubled = text.replace('\'', "''");
    if doubled.contains('\\') {
        format!(" E'{}'", doubled.replace('\\', "\\\\"))
    } else {
        format!("'{doubled}'")
    }
}

/// Takes an SQL identifier off the front of a text: its name, and what follows. Without quotes it is in lower case.
pub fn identifier(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let is_first = |c: char| c.is_ascii_alphabetic() || c == '_' || !c.is_ascii();
        let goes_on = |c: char| is_first(c) || c.is_ascii_digit() || c == '$';
        let end = text.find(|c| !goes_on(c)).unwrap_or(text.len());
        let (name, rest) = text.split_at(end);
        return name
            .starts_with(is_first)
            .then(|| (name.to_ascii_lowercase(), rest));
    };
    let mut name = String::new();
    let mut rest = quoted;
    loop {
        let (part, behind) = rest.split_once('"')?;
        name.push_str(part);
        match behind.strip_prefix('"') {
            Some(behind) => {
                name.push('"');
                rest = behind;
            }
            None => return (!name.is_empty()).then_some((name, behind)),
        }
    }
}
