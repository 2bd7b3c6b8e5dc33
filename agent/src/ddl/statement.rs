//! ● Which statement an event of the source was, and whether it may be run again as text.
//!
//! Two questions, answered one after the other. *Which*: the innermost statement that PG_CONTEXT names (`context`), or, where
//! no function stands between, one of those that the client sent (`script`). *Whether*: `judge` reads its tree. Wherever
//! one of the answers is not certain there is no text, and the shape alone decides; so a wrong "no" costs only work. A wrong
//! "yes" is found when the shapes are compared.
//!
//! The parser is `squawk-syntax`: PostgreSQL's grammar in Rust, with `BEGIN ATOMIC`, dollar quotes and a tree that keeps every
//! byte. `pg_query` is the server's own grammar, but needs libclang and a minute of every cold build; `sqlparser` knows only half of
//! the `ALTER` commands. What squawk does not understand has no text. It descends by recursion, so it gets a thread with room,
//! and is not asked about what is nested deeper than people write.
//!
//! # What it does not do
//! What becomes of rows is decided in `apply`. It knows no catalog: whether a name is a function of the user's own with the name of PostgreSQL's, or a column's type a
//! domain, it cannot tell. `standard_conforming_strings` is taken for on; where off would split the text elsewhere there is none.

mod context;
mod expression;
mod judge;
mod script;
#[cfg(test)]
mod tests;

use crate::schema::ddl::DdlEvent;

use context::Frame;

/// What the parser may take, for the deepest text that it is asked about (measured: 128 MB at 20,000 levels, unoptimized).
/// Only what is used is ever taken from the system.
const STACK: usize = 256 << 20;

/// What a command was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Statement {
    /// It may be run as it is, by whoever ran it, in a transaction: one statement, without its semicolon.
    Exact(String),
    /// Only the shapes tell what to do, and why.
    Shape(Why),
}

/// Why an event is not simply run again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Why {
    /// The source did not say what was run, or not in a form that is known here.
    NoText,
    /// It ran in the body of a function in SQL, which is in no message.
    SqlFunction,
    /// The parser does not understand it, or it is too long or too deep.
    Unparsed,
    /// No statement of the text can have caused the event.
    NotFound,
    /// Several can.
    Ambiguous,
    /// How the text is read hangs on standard_conforming_strings.
    Backslash,
    /// CONCURRENTLY: not in a transaction.
    Concurrently,
    /// It names a tablespace.
    Tablespace,
    /// It would evaluate code of the user's own, which the shapes need not.
    UserCode,
    /// Its outcome hangs on the moment or the session.
    Session,
    /// Each row has got a value of its own.
    RowByRow,
    /// Its rows are those of a query.
    Query,
    /// A materialized view is filled.
    MaterializedView,
    /// It would ask another server.
    OtherServer,
    /// It writes storage anew, and no object.
    Storage,
}

/// Finds the statement of an event.
#[must_use]
pub fn of(event: &DdlEvent) -> Statement {
    let with_room = std::thread::Builder::new().stack_size(STACK);
    std::thread::scope(|scope| {
        let found = with_room.spawn_scoped(scope, || find(event)).ok()?;
        found.join().ok()
    })
    .unwrap_or(Statement::Shape(Why::Unparsed))
}

fn find(event: &DdlEvent) -> Statement {
    let Some(context) = &event.context else {
        return Statement::Shape(Why::NoText);
    };
    let found = match context::innermost(context) {
        Frame::Client => match &event.query {
            Some(query) => script::choose(query, event, event.ordinal),
            None => Err(Why::NoText),
        },
        Frame::SqlFunction => Err(Why::SqlFunction),
        Frame::Unknown => Err(Why::NoText),
        // Where the statement ends is certain only if at one of the places something whole ends.
        Frame::Sql(texts) => {
            let mut whole = texts
                .iter()
                .map(|text| script::choose(text, event, None))
                .filter(|found| !matches!(found, Err(Why::Unparsed | Why::NotFound)));
            match (whole.next(), whole.next()) {
                (Some(found), None) => found,
                (Some(_), Some(_)) => Err(Why::Ambiguous),
                (None, _) => Err(Why::Unparsed),
            }
        }
    };
    match found {
        Ok(node) => judge::judge(&node, event),
        Err(why) => Statement::Shape(why),
    }
}
