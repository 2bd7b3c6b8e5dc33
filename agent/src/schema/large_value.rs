//! `dr_agent.large_value` on the replica: values on their way, that are too large to stand in a statement.
//!
//! Unlogged, and empty between two transactions of the agent.

/// The table.
pub const TABLE: &str = "dr_agent.large_value";

/// Puts them there.
pub const COPY_IN: &str = "COPY dr_agent.large_value (number, bytes) FROM STDIN (FORMAT binary)";

/// Removes them.
pub const REMOVE: &str = "DELETE FROM dr_agent.large_value";

/// One of them, as a value in a statement: `value` is made of `l.bytes`, `number` is SQL.
pub fn taken(value: &str, number: &str) -> String {
    format!("(SELECT {value} FROM {TABLE} AS l WHERE l.number OPERATOR(pg_catalog.=) {number})")
}
