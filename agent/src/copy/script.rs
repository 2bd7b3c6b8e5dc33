//! ● The SQL of `pg_restore --file=-`, taken apart: statements, and the objects that they make.
//!
//! Every object has a comment before its first statement, with its name and kind; what has none belongs to the object before it.
//!
//! # Invariants
//! - Quotes, bodies and comments are passed over; the pieces together are the script.
//!
//! # What it does not do
//! It understands no statement.

/// Begins the comment before an object.
const NAME: &str = "-- Name: ";

/// What a script makes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ScriptObject {
    /// `INDEX`, `FK CONSTRAINT`, …; empty for a setting of the session.
    pub(super) kind: String,
    /// Kind and name, for people.
    pub(super) what: String,
    /// Its statements.
    pub(super) sql: String,
    /// How many those are.
    pub(super) statements: usize,
}

/// The settings with which a script begins, and its objects in their order.
pub(super) fn objects(script: &str) -> (String, Vec<ScriptObject>) {
    let mut preamble = String::new();
    let mut objects: Vec<ScriptObject> = Vec::new();
    for piece in statements(script) {
        let statement = without_comments(piece);
        if statement.is_empty() {
            continue;
        }
        let (kind, what) = match named(piece) {
            Some(named) => named,
            // Between two objects: a setting for those that follow.
            None if statement.starts_with("SET ") && !objects.is_empty() => {
                (String::new(), statement.to_owned())
            }
            None => {
                let sql = match objects.last_mut() {
                    Some(object) => {
                        object.statements += 1;
                        &mut object.sql
                    }
                    None => &mut preamble,
                };
                sql.push_str(statement);
                sql.push('\n');
                continue;
            }
        };
        objects.push(ScriptObject {
            kind,
            what,
            sql: format!("{statement}\n"),
            statements: 1,
        });
    }
    (preamble, objects)
}

/// Kind, and what to call it, from the comment before a statement.
fn named(piece: &str) -> Option<(String, String)> {
    let comments = &piece[..piece.len() - without_comments_start(piece).len()];
    let line = comments.lines().rfind(|line| line.starts_with(NAME))?;
    let (name, rest) = line.strip_prefix(NAME)?.rsplit_once("; Type: ")?;
    let (kind, rest) = rest.split_once("; Schema: ")?;
    let schema = rest
        .split_once("; Owner: ")
        .map_or("-", |(schema, _)| schema);
    let place = if schema == "-" { "" } else { " of schema " };
    let schema = if schema == "-" { "" } else { schema };
    let what = format!("{} {name}{place}{schema}", kind.to_lowercase());
    Some((kind.to_owned(), what))
}

/// A statement without the comments before it.
pub(super) fn without_comments(piece: &str) -> &str {
    without_comments_start(piece).trim_end()
}

/// A statement from its first word on.
fn without_comments_start(piece: &str) -> &str {
    let mut rest = piece.trim_start();
    while rest.starts_with("--") {
        rest = rest
            .split_once('\n')
            .map_or("", |(_, rest)| rest)
            .trim_start();
    }
    rest
}

/// The statements of a script, each with what stands before it.
pub(super) fn statements(script: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut begin = 0;
    let mut at = 0;
    while at < script.len() {
        let rest = &script[at..];
        at += match rest.as_bytes()[0] {
            b'\'' => quoted(rest, '\'', script[..at].ends_with(['E', 'e'])),
            b'"' => quoted(rest, '"', false),
            b'-' if rest.starts_with("--") => rest.find('\n').map_or(rest.len(), |end| end + 1),
            b'$' => dollar_quoted(rest),
            b';' => {
                pieces.push(&script[begin..=at]);
                begin = at + 1;
                1
            }
            _ => rest.chars().next().map_or(1, char::len_utf8),
        };
    }
    pieces.push(&script[begin..]);
    pieces
}

/// How long a quoted piece is.
fn quoted(text: &str, quote: char, escapes: bool) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' if escapes => escaped = true,
            // A doubled quote ends one piece and begins the next.
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// How long a dollar-quoted piece is; 1 where the dollar is none.
fn dollar_quoted(text: &str) -> usize {
    let Some(end) = text[1..].find('$') else {
        return 1;
    };
    let tag = &text[..end + 2];
    let name = &tag[1..tag.len() - 1];
    let is_tag = name.chars().all(|c| c.is_alphanumeric() || c == '_');
    if !is_tag || name.starts_with(|c: char| c.is_ascii_digit()) {
        return 1;
    }
    text[tag.len()..]
        .find(tag)
        .map_or(text.len(), |end| end + 2 * tag.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRIPT: &str = "--
-- PostgreSQL database dump
--

SET statement_timeout = 0;
SELECT pg_catalog.set_config('search_path', '', false);

SET default_tablespace = '';

--
-- Name: t t_pkey; Type: CONSTRAINT; Schema: public; Owner: app
--

ALTER TABLE ONLY public.t
    ADD CONSTRAINT t_pkey PRIMARY KEY (id);


--
-- Name: a; Type: b; Type: INDEX; Schema: public; Owner: app
--

CREATE INDEX \"a; Type: b\" ON public.t USING btree (v);


ALTER TABLE public.t CLUSTER ON \"a; Type: b\";

SET default_table_access_method = heap;

--
-- Name: f(); Type: FUNCTION; Schema: -; Owner: app
--

CREATE FUNCTION f() RETURNS void LANGUAGE sql BEGIN ATOMIC SELECT 1; SELECT 2; END;

--
-- PostgreSQL database dump complete
--

";

    #[test]
    fn a_script_is_its_settings_and_its_objects() {
        let (preamble, objects) = objects(SCRIPT);
        assert_eq!(preamble.lines().count(), 3, "{preamble}");
        let seen: Vec<_> = objects
            .iter()
            .map(|object| (object.kind.as_str(), object.statements))
            .collect();
        let expected = [("CONSTRAINT", 1), ("INDEX", 2), ("", 1), ("FUNCTION", 3)];
        assert_eq!(seen, expected);
        assert_eq!(objects[0].what, "constraint t t_pkey of schema public");
        assert_eq!(objects[1].what, "index a; Type: b of schema public");
        assert!(objects[3].sql.trim_end().ends_with("END;"));
    }

    #[test]
    fn quotes_bodies_and_comments_are_passed_over() {
        assert_eq!(
            statements("a 'x;''y' \"b;\" E'\\';' $1 $$;$$ -- ;\n;b").len(),
            2
        );
    }
}
