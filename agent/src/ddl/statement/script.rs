//! ● The statement of a string that caused an event.
//!
//! Measured on 15 and 18: a command that has events fires `ddl_command_end` exactly once, under its own tag, also where it did
//! nothing (IF NOT EXISTS) or several things (serial, several actions, elements of CREATE SCHEMA); commands on shared objects
//! and DML never fire. Of several statements with the tag, the ordinal chooses where everything before it is known to count
//! as said; what functions and triggers define is not counted (`agent/sql/capture.sql`); extensions' scripts and REFRESH
//! CONCURRENTLY fire by themselves, and a rollback takes the count back, so behind those only the objects' names can choose.

use squawk_syntax::ast::AstNode;
use squawk_syntax::{SourceFile, SyntaxKind, SyntaxNode};

use crate::schema::ddl::{DdlEvent, EventKind};

use super::Why;

/// No text longer than this is parsed.
const BYTES_MAX: usize = 4 << 20;
/// Nor a statement of more tokens than this,
const TOKENS_MAX: usize = 20_000;
/// or nested deeper: the parser's time grows with the square of it.
const NESTED_MAX: usize = 100;
/// Nor cut more often.
const CUTS_MAX: usize = 32;

/// Whether the parser can be asked about a text: its length, and how deep it is nested.
fn is_bounded(text: &str) -> bool {
    use squawk_lexer::TokenKind;
    let (mut tokens, mut nested) = (0_usize, 0_usize);
    text.len() <= BYTES_MAX
        && squawk_lexer::tokenize(text).all(|token| {
            match token.kind {
                TokenKind::Whitespace => return true,
                TokenKind::Semi => tokens = 0,
                TokenKind::OpenParen | TokenKind::OpenBracket => nested += 1,
                TokenKind::CloseParen | TokenKind::CloseBracket => {
                    nested = nested.saturating_sub(1);
                }
                _ => {}
            }
            tokens += 1;
            tokens <= TOKENS_MAX && nested <= NESTED_MAX
        })
}

/// A quote behind a backslash ends a plain string, or does not.
fn hangs_on_backslash(root: &SyntaxNode) -> bool {
    let tokens = root.descendants_with_tokens();
    tokens
        .filter_map(|element| element.into_token())
        .any(|t| t.kind() == SyntaxKind::STRING && (t.text().contains("\\'")))
}

/// Where a semicolon within a statement separates it from the next: not in a body of `BEGIN ATOMIC` or the list of a rule.
fn ends_early(node: &SyntaxNode) -> Option<usize> {
    use SyntaxKind as K;
    let last = node.last_token()?;
    let tokens = node.descendants_with_tokens();
    let mut ends = tokens
        .filter_map(|element| element.into_token())
        .filter(|token| {
            let within = || token.parent_ancestors().any(|n| n.kind() == K::ATOMIC_BODY);
            token.kind() == K::SEMICOLON
                && *token != last
                && node.kind() != K::CREATE_RULE
                && !within()
        });
    ends.next().map(|token| token.text_range().start().into())
}

/// The statements of a text. Squawk 2.68 takes what follows `CREATE SCHEMA s CREATE TABLE t (a int);` for elements of the
/// schema too; there the text is cut, and asked about again.
fn statements(text: &str) -> Result<Vec<SyntaxNode>, Why> {
    let (mut found, mut rest) = (Vec::new(), text);
    for _ in 0..CUTS_MAX {
        let parse = SourceFile::parse(rest);
        let nodes: Vec<SyntaxNode> = parse.tree().stmts().map(|s| s.syntax().clone()).collect();
        let Some(end) = nodes.iter().find_map(ends_early) else {
            found.extend(nodes);
            let sound = parse.errors().is_empty();
            return if sound { Ok(found) } else { Err(Why::Unparsed) };
        };
        let parse = SourceFile::parse(&rest[..end]);
        if !parse.errors().is_empty() {
            return Err(Why::Unparsed);
        }
        found.extend(parse.tree().stmts().map(|s| s.syntax().clone()));
        rest = &rest[end + 1..];
    }
    Err(Why::Unparsed)
}

/// The statement in `text` that caused the event. Without an ordinal, if only one can have.
pub(super) fn choose(
    text: &str,
    event: &DdlEvent,
    ordinal: Option<i32>,
) -> Result<SyntaxNode, Why> {
    if !is_bounded(text) {
        return Err(Why::Unparsed);
    }
    let statements = statements(text)?;
    if statements.iter().any(hangs_on_backslash) {
        return Err(Why::Backslash);
    }
    // A drop by the way is one that the command names: `ALTER TABLE … DROP COLUMN`.
    let drops = |node: &SyntaxNode| words(node).any(|word| word == "DROP");
    let fits = |node: &&SyntaxNode| {
        tag(node).as_deref() == Some(event.tag.as_str())
            && (event.kind != EventKind::Drop || drops(node))
    };
    let candidates: Vec<&SyntaxNode> = statements.iter().filter(fits).collect();
    let [first, others @ ..] = &candidates[..] else {
        return Err(Why::NotFound);
    };
    if others.iter().all(|other| other.text() == first.text()) {
        return Ok((*first).clone());
    }
    let named: Vec<&&SyntaxNode> = candidates.iter().filter(|n| names(n, event)).collect();
    match (counted(&statements, event, ordinal), &named[..]) {
        (Some(chosen), _) if fits(&chosen) && (named.is_empty() || names(chosen, event)) => {
            Ok(chosen.clone())
        }
        (None, [only]) => Ok((**only).clone()),
        _ => Err(Why::Ambiguous),
    }
}

/// The statement that the ordinal means, where all before it count as is known.
fn counted<'s>(
    statements: &'s [SyntaxNode],
    event: &DdlEvent,
    ordinal: Option<i32>,
) -> Option<&'s SyntaxNode> {
    use SyntaxKind as K;
    let takes_back = |node: &SyntaxNode| {
        let kinds = [
            K::ROLLBACK_TRANSACTION,
            K::ROLLBACK_TO_SAVEPOINT,
            K::RESET,
            K::DISCARD,
        ];
        kinds.contains(&node.kind())
    };
    if statements.iter().any(takes_back) {
        return None;
    }
    let mut left = ordinal?;
    for statement in statements {
        left -= fires(statement, event.kind)?;
        if left == 0 {
            return Some(statement);
        }
    }
    None
}

fn kind(node: &SyntaxNode) -> String {
    format!("{:?}", node.kind()).replace('_', " ")
}

/// Commands on these have no events.
const SHARED: &[&str] = &[
    "DATABASE",
    "ROLE",
    "USER",
    "GROUP",
    "TABLESPACE",
    "SYSTEM",
    "EVENT TRIGGER",
];

fn is_shared(node: &SyntaxNode) -> bool {
    let has = |wanted: &[SyntaxKind]| node.children().any(|child| wanted.contains(&child.kind()));
    match node.kind() {
        SyntaxKind::GRANT | SyntaxKind::REVOKE => {
            !words(node).any(|word| word == "ON")
                || words(node)
                    .skip_while(|word| word != "ON")
                    .nth(1)
                    .is_some_and(|word| {
                        ["DATABASE", "TABLESPACE", "PARAMETER"].contains(&word.as_str())
                    })
        }
        SyntaxKind::COMMENT_ON | SyntaxKind::SECURITY_LABEL => has(&[
            SyntaxKind::OBJECT_DATABASE,
            SyntaxKind::OBJECT_ROLE,
            SyntaxKind::OBJECT_TABLESPACE,
            SyntaxKind::OBJECT_EVENT_TRIGGER,
        ]),
        _ => kind(node)
            .split_once(' ')
            .is_some_and(|(_, object)| SHARED.contains(&object)),
    }
}

/// The command tag of a statement that has events.
fn tag(node: &SyntaxNode) -> Option<String> {
    let kind = kind(node);
    let verb = kind.split(' ').next().unwrap_or_default();
    let tag = match kind.as_str() {
        "COMMENT ON" => "COMMENT",
        "REFRESH" => "REFRESH MATERIALIZED VIEW",
        "DROP TEXT SEARCH CONFIG" => "DROP TEXT SEARCH CONFIGURATION",
        "DROP TEXT SEARCH DICT" => "DROP TEXT SEARCH DICTIONARY",
        "GRANT"
        | "REVOKE"
        | "SECURITY LABEL"
        | "SELECT INTO"
        | "IMPORT FOREIGN SCHEMA"
        | "REINDEX" => &kind,
        _ if ["CREATE", "ALTER", "DROP"].contains(&verb) => &kind,
        _ => return None,
    };
    (!is_shared(node)).then(|| tag.to_owned())
}

/// How many events of a kind it fires; none if that is not known.
fn fires(node: &SyntaxNode, event: EventKind) -> Option<i32> {
    use SyntaxKind as K;
    if tag(node).is_none() {
        // What functions and triggers define within a statement is not counted: the trigger sees that by its context. ROLLBACK, RESET
        // and DISCARD take the count back.
        let silences =
            |word: String| ["EVENT_TRIGGERS", "SESSION_REPLICATION_ROLE"].contains(&word.as_str());
        let silent = is_shared(node) || node.kind() != K::SET || !words(node).any(silences);
        return silent.then_some(0);
    }
    match node.kind() {
        K::CREATE_EXTENSION | K::ALTER_EXTENSION | K::REINDEX | K::IMPORT_FOREIGN_SCHEMA => None,
        K::REFRESH if words(node).any(|word| word == "CONCURRENTLY") => None,
        _ if event == EventKind::Command => Some(1),
        K::DROP_OWNED => None,
        _ if kind(node).starts_with("DROP ") => {
            let sure = !node.children().any(|child| child.kind() == K::IF_EXISTS);
            sure.then_some(1)
        }
        _ if kind(node).starts_with("CREATE ") => Some(0),
        K::COMMENT_ON | K::GRANT | K::REVOKE | K::SECURITY_LABEL => Some(0),
        _ => None,
    }
}

/// The words of a statement, in capitals where they are not quoted.
pub(super) fn words(node: &SyntaxNode) -> impl Iterator<Item = String> {
    let tokens = node.descendants_with_tokens();
    let tokens = tokens.filter_map(|element| element.into_token());
    tokens
        .filter(|token| !token.kind().is_trivia())
        .map(|token| match token.text().starts_with(['"', '\'']) {
            true => token.text().to_owned(),
            false => token.text().to_uppercase(),
        })
}

/// Whether a statement names one of the event's objects.
fn names(node: &SyntaxNode, event: &DdlEvent) -> bool {
    let said: Vec<String> = words(node)
        .map(|word| match word.strip_prefix('"') {
            Some(quoted) => quoted.trim_end_matches('"').replace("\"\"", "\""),
            None => word.to_lowercase(),
        })
        .collect();
    // A type's name comes in one piece: `public.mood`.
    let is_said = |name: &String| {
        let last = name.rsplit('.').next().unwrap_or_default();
        said.contains(name) || said.iter().any(|said| said == last.trim_matches('"'))
    };
    let objects = event.objects.iter();
    objects
        .filter(|object| event.kind == EventKind::Command || object.original)
        .any(|object| object.address.names.last().is_some_and(is_said))
}
