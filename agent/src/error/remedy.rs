//! ● The only advice of this program that removes something, and when that loses nothing.
//!
//! On the bad day the replica is the only copy there is. Whatever went wrong, a hint that is followed at three in the morning must
//! not take that away; so nobody else words such advice (a test of the sources looks).
//!
//! # Invariants
//! - The condition comes before the statement.

/// When a replica may go: what every advice to drop one begins with.
const ONLY_WHILE: &str =
    "Only while the source is in use and sound, and nobody needs what the replica alone has";

/// Nothing was promoted, and applications stay where they are; said where a person might think otherwise.
pub const STAY: &str = "no promotion has happened, and applications stay with the source";

/// How to copy everything anew: `also` is what goes beside the replica's database, `then` what begins again.
pub fn start_over_with(also: Option<&str>, then: &str) -> String {
    let also = also.map(|also| format!(" and {also}")).unwrap_or_default();
    format!(
        "{ONLY_WHILE}: to start over, run DROP DATABASE for this database on the replica{also}, then {then}"
    )
}

/// The same under route `direct`.
pub fn start_over(also: &str) -> String {
    start_over_with(Some(also), "`dr-agent run`")
}

/// Drops the slot of a stream.
pub fn drop_slot(stream: &str) -> String {
    format!("SELECT pg_drop_replication_slot('{stream}') on the source")
}

/// Drops the slot, which may be gone already.
pub const SLOT_TOO: &str = "drop the slot on the source if it is there";

/// Both what the source keeps of a stream.
pub const SLOT_AND_NOTE: &str = "drop the slot and the row of dr_agent.sending on the source";

/// How to have one table copied anew.
pub fn copy_again(table: Option<&str>) -> String {
    let row = table.map_or_else(
        || "its row from dr_agent.table_sync".to_owned(),
        |table| format!("FROM dr_agent.table_sync WHERE table_name = '{table}'"),
    );
    format!(
        "While the source is in use and has all rows of the table, it can be copied again: SET \
         default_transaction_read_only = off and DELETE {row} on the replica, empty the table there if it is still there, and \
         start the agent"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_condition_comes_before_the_statement() {
        for advice in [
            start_over(SLOT_TOO),
            start_over_with(None, "`dr-agent apply`"),
            copy_again(Some("t")),
            copy_again(None),
        ] {
            let removes = advice
                .find("DROP")
                .or_else(|| advice.find("DELETE"))
                .unwrap();
            assert!(
                advice.find("hile the source is in use").unwrap() < removes,
                "{advice}"
            );
        }
    }
}
