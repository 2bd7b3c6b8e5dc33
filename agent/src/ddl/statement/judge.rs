//! ● Whether a statement may be run again as text.
//!
//! Not where its outcome is the moment's or the session's, where it asks what is not here (tablespaces, other servers), where
//! it cannot be in a transaction, where rows come from a query, and where it would evaluate what may be the user's own code and the
//! shapes would not: a function can RESET ROLE, and then has the agent's rights. CREATE INDEX may: the server itself runs its expressions in a
//! security-restricted operation. So may what is only stored: defaults of a new table, views, bodies, policies.

use squawk_syntax::{SyntaxKind as K, SyntaxNode};

use crate::schema::ddl::DdlEvent;

use super::expression::{Outcome, is_hidden, names_a_moment, outcome};
use super::script::words;
use super::{Statement, Why};

/// May it?
pub(super) fn judge(node: &SyntaxNode, event: &DdlEvent) -> Statement {
    let hidden = is_hidden(&event.search_path);
    let by_action = || node.children().find_map(|part| by_action(&part, hidden));
    match by_kind(node).or_else(|| by_clause(node)).or_else(by_action) {
        Some(why) => Statement::Shape(why),
        None => {
            let text = node.text().to_string();
            let text = text.trim().trim_end_matches(';').trim_end();
            Statement::Exact(text.to_owned())
        }
    }
}

fn has(node: &SyntaxNode, kinds: &[K]) -> bool {
    node.descendants().any(|part| kinds.contains(&part.kind()))
}

fn says(node: &SyntaxNode, word: &str) -> bool {
    words(node).any(|said| said == word)
}

/// What the kind of the statement alone decides.
fn by_kind(node: &SyntaxNode) -> Option<Why> {
    let no_data = has(node, &[K::WITH_NO_DATA]);
    Some(match node.kind() {
        K::REINDEX => Why::Storage,
        K::REFRESH => Why::MaterializedView,
        K::CREATE_MATERIALIZED_VIEW if !no_data => Why::MaterializedView,
        K::CREATE_TABLE_AS if !no_data => Why::Query,
        K::SELECT_INTO => Why::Query,
        K::IMPORT_FOREIGN_SCHEMA => Why::OtherServer,
        _ => return None,
    })
}

/// What a clause anywhere in it decides.
fn by_clause(node: &SyntaxNode) -> Option<Why> {
    let tablespace = [
        K::TABLESPACE_CLAUSE,
        K::SET_TABLESPACE,
        K::CONSTRAINT_INDEX_TABLESPACE,
        K::ALL_IN_TABLESPACE,
        K::OBJECT_TABLESPACE,
    ];
    if has(node, &tablespace) {
        return Some(Why::Tablespace);
    }
    let on_an_index = matches!(node.kind(), K::CREATE_INDEX | K::DROP_INDEX);
    if has(node, &[K::DETACH_CONCURRENTLY]) || on_an_index && says(node, "CONCURRENTLY") {
        return Some(Why::Concurrently);
    }
    if node.kind() == K::ALTER_TABLE && says(node, "FINALIZE") {
        return Some(Why::Concurrently);
    }
    if has(node, &[K::FROM_CURRENT, K::ROLE_REF_SESSION_USER]) {
        return Some(Why::Session);
    }
    // Literals are read when the statement is; not so a comment, or the text of a body.
    let texts = [
        K::COMMENT_ON,
        K::SECURITY_LABEL,
        K::CREATE_FUNCTION,
        K::CREATE_PROCEDURE,
    ];
    if !texts.contains(&node.kind()) && names_a_moment(node) {
        return Some(Why::Session);
    }
    let bounds = [K::PARTITION_FOR_VALUES_IN, K::PARTITION_FOR_VALUES_FROM];
    let mut bounds = node
        .descendants()
        .filter(|part| bounds.contains(&part.kind()));
    bounds.find_map(|bound| match outcome(&bound) {
        Outcome::Same => None,
        Outcome::Session => Some(Why::Session),
        Outcome::Unknown => Some(Why::UserCode),
    })
}

/// What an action of ALTER TABLE evaluates for the rows that are there, as far as the shapes would not. A constraint is
/// evaluated either way, and by the statement with less rights.
fn by_action(action: &SyntaxNode, hidden: bool) -> Option<Why> {
    let outcome = |node: &SyntaxNode| match hidden {
        true if has(node, &[K::CALL_EXPR, K::BIN_EXPR, K::CAST_EXPR]) => Outcome::Unknown,
        _ => outcome(node),
    };
    match action.kind() {
        K::MERGE_PARTITIONS | K::SPLIT_PARTITION => Some(Why::Query),
        K::ADD_COLUMN => added(action, outcome),
        K::ALTER_COLUMN => {
            let using = action.descendants().find(|n| n.kind() == K::USING_EXPR)?;
            match outcome(&using) {
                Outcome::Same => None,
                Outcome::Session => Some(Why::Session),
                Outcome::Unknown => Some(Why::UserCode),
            }
        }
        _ => None,
    }
}

/// A column added: what the rows that are there get.
fn added(column: &SyntaxNode, outcome: impl Fn(&SyntaxNode) -> Outcome) -> Option<Why> {
    let is_type = |node: &SyntaxNode| format!("{:?}", node.kind()).ends_with("_TYPE");
    let typed = column.children().find(is_type);
    let serial = typed.as_ref().and_then(|node| words(node).last());
    let serial = serial.is_some_and(|name| {
        let names = [
            "SERIAL",
            "BIGSERIAL",
            "SMALLSERIAL",
            "SERIAL2",
            "SERIAL4",
            "SERIAL8",
        ];
        names.contains(&name.as_str())
    });
    if serial || has(column, &[K::GENERATED_IDENTITY]) {
        return Some(Why::RowByRow);
    }
    let default = column
        .children()
        .find(|n| n.kind() == K::DEFAULT_CONSTRAINT)?;
    match outcome(&default) {
        Outcome::Same => None,
        Outcome::Session => Some(Why::Session),
        Outcome::Unknown => Some(Why::RowByRow),
    }
}
