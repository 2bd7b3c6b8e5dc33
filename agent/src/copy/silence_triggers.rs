//! Triggers and rules that would act on replicated changes are made to wait for the promotion.
//!
//! Whatever a trigger does on the source reaches the replica as changes of its own. One that fires
//! ALWAYS or in replica role would do it a second time there, and the replica would no longer equal
//! the source. ALWAYS becomes ORIGIN: quiet while changes are applied, and firing for everybody once
//! the replica is open. REPLICA becomes disabled: it never fired for anybody but a replication.
//!
//! # Invariants
//! - Repeatable; changes nothing where nothing fires.

use tokio_postgres::{Client, Row};

use super::error::CopyError;
use super::progress::CopyObserver;
use crate::names::TableName;
use crate::pg::quote::quote_ident;

/// What fires in replica role: kind, schema, table, name, and whether ALWAYS. Event triggers come
/// first, because they fire when the others are altered.
const FIRING: &str = "
    SELECT 'TRIGGER', n.nspname::text, c.relname::text, g.tgname::text, g.tgenabled = 'A'
      FROM pg_trigger g JOIN pg_class c ON c.oid = g.tgrelid
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE g.tgenabled IN ('A', 'R') AND NOT g.tgisinternal AND n.nspname <> 'dr_agent'
    UNION ALL
    SELECT 'RULE', n.nspname, c.relname, r.rulename, r.ev_enabled = 'A'
      FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE r.ev_enabled IN ('A', 'R') AND r.rulename <> '_RETURN' AND n.nspname <> 'dr_agent'
    UNION ALL
    SELECT 'EVENT TRIGGER', '', '', evtname, evtenabled = 'A'
      FROM pg_event_trigger WHERE evtenabled IN ('A', 'R')
     ORDER BY 1";

/// Quiets the replica's triggers, rules and event triggers.
pub(crate) async fn quiet(replica: &Client, observer: &dyn CopyObserver) -> Result<(), CopyError> {
    let firing = replica
        .query(FIRING, &[])
        .await
        .map_err(CopyError::replica("read the triggers"))?;
    for row in &firing {
        let (statement, what) = change(row.get(0), &target(row), row.get(3), row.get(4));
        replica
            .batch_execute(&statement)
            .await
            .map_err(CopyError::replica("quiet a trigger"))?;
        super::leave_out(observer, &what);
    }
    Ok(())
}

fn target(row: &Row) -> TableName {
    TableName {
        schema: row.get(1),
        name: row.get(2),
    }
}

fn change(kind: &str, table: &TableName, name: &str, always: bool) -> (String, String) {
    let (verb, mode) = if always {
        ("ENABLE", "ENABLE ALWAYS")
    } else {
        ("DISABLE", "ENABLE REPLICA")
    };
    let quoted = quote_ident(name);
    if kind == "EVENT TRIGGER" {
        let statement = format!("ALTER EVENT TRIGGER {quoted} {verb}");
        return (statement, format!("{mode} of event trigger {name}"));
    }
    (
        format!("ALTER TABLE ONLY {} {verb} {kind} {quoted}", table.sql()),
        format!("{mode} of {} {name} on {table}", kind.to_lowercase()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn always_waits_for_the_promotion_and_replica_never_fires() {
        let table = TableName {
            schema: "s".into(),
            name: "t".into(),
        };
        assert_eq!(
            change("TRIGGER", &table, "Audit", true).0,
            "ALTER TABLE ONLY \"s\".\"t\" ENABLE TRIGGER \"Audit\""
        );
        assert_eq!(
            change("RULE", &table, "r", false).0,
            "ALTER TABLE ONLY \"s\".\"t\" DISABLE RULE \"r\""
        );
        assert_eq!(
            change("EVENT TRIGGER", &table, "e", true).0,
            "ALTER EVENT TRIGGER \"e\" ENABLE"
        );
    }
}
