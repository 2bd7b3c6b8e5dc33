//! ● The innermost SQL statement that PG_CONTEXT of an event trigger names.
//!
//! Measured on 15 and 18. Its first line is the trigger function's own frame; if it is the only one, the statement is the
//! client's. Otherwise the next frame is what ran: `SQL statement "…"` for PL/pgSQL (static, EXECUTE and DO alike, the text
//! as it is, quotes and newlines included), `SQL function "f" statement 1` for SQL. The words come in the language of
//! lc_messages, and so do the quotes; only the structure is used here.

/// Closing quote for each opening one, over the languages of the server.
const QUOTES: &[(char, char)] = &[('"', '"'), ('«', '»'), ('»', '«'), ('“', '”'), ('„', '“')];

/// A statement with more line ends behind quotes than this is not looked at.
const ENDS_MAX: usize = 16;

/// What ran the statement.
pub(super) enum Frame {
    /// The client sent it.
    Client,
    /// A function did: this text. It ends where the frame ends, which can be at several places.
    Sql(Vec<String>),
    /// A function in SQL.
    SqlFunction,
    /// Something else.
    Unknown,
}

/// The frame inside which the trigger fired.
pub(super) fn innermost(context: &str) -> Frame {
    let Some((_, rest)) = context.split_once('\n') else {
        return Frame::Client;
    };
    if rest.starts_with("SQL function ") {
        return Frame::SqlFunction;
    }
    let first = rest.lines().next().unwrap_or_default();
    let opening = first.char_indices().find_map(|(at, c)| {
        let (_, closing) = QUOTES.iter().find(|(opening, _)| *opening == c)?;
        Some((at, c.len_utf8(), *closing))
    });
    let Some((at, length, closing)) = opening.filter(|(at, ..)| first[..*at].contains("SQL"))
    else {
        return Frame::Unknown;
    };
    let text = &rest[at + length..];
    let ends = text.char_indices().filter(|(at, c)| {
        let behind = &text[at + c.len_utf8()..];
        *c == closing && (behind.is_empty() || behind.starts_with('\n'))
    });
    let texts: Vec<String> = ends
        .take(ENDS_MAX + 1)
        // French puts a narrow space within its quotes.
        .map(|(end, _)| text[..end].trim().to_owned())
        .collect();
    match texts.len() {
        0 => Frame::Unknown,
        many if many > ENDS_MAX => Frame::Unknown,
        _ => Frame::Sql(texts),
    }
}
