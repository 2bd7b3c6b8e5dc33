//! Triggers and rules that would act on replicated changes are made to wait for the opening of the database.
//!
//! Whatever a trigger does on the source reaches the replica as changes of its own. One that fires
//! ALWAYS or in replica role would do it a second time there, and the replica would no longer equal
//! the source. ALWAYS becomes ORIGIN: quiet while changes are applied. REPLICA becomes disabled: it never fired for anybody but
//! a replication. What they were is kept in `dr_agent.deferred`, and they are so again once the database is opened. Not so event
//! triggers, which would see what the opening itself still has to do: one that fired ALWAYS fires for ordinary sessions from then on.
//!
//! # Invariants
//! - Repeatable; changes nothing where nothing fires.

use tokio_postgres::{GenericClient, Row};

use super::deferred;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::PgError;
use crate::pg::quote::{quote_ident, quote_literal};

/// What fires in replica role: kind, schema, table, name, and whether ALWAYS. Event triggers come
/// first, because they fire when the others are altered.
const FIRING: &str = "
    SELECT 'TRIGGER', n.nspname::text, c.relname::text, g.tgname::text, g.tgenabled = 'A'
      FROM pg_catalog.pg_trigger g JOIN pg_catalog.pg_class c ON c.oid = g.tgrelid
      JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE g.tgenabled IN ('A', 'R') AND NOT g.tgisinternal AND n.nspname <> 'dr_agent'
    UNION ALL
    SELECT 'RULE', n.nspname, c.relname, r.rulename, r.ev_enabled = 'A'
      FROM pg_catalog.pg_rewrite r JOIN pg_catalog.pg_class c ON c.oid = r.ev_class
      JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE r.ev_enabled IN ('A', 'R') AND r.rulename <> '_RETURN' AND n.nspname <> 'dr_agent'
    UNION ALL
    SELECT 'EVENT TRIGGER', '', '', evtname, evtenabled = 'A'
      FROM pg_catalog.pg_event_trigger WHERE evtenabled IN ('A', 'R')
     ORDER BY 1";

/// Quiets triggers, rules and event triggers; returns what was quieted, for people. With a stream, they are kept for the opening.
///
/// # Errors
/// When the server refuses.
pub async fn quiet(
    client: &(impl GenericClient + Sync),
    stream: Option<&StreamName>,
) -> Result<Vec<String>, PgError> {
    let mut quieted = Vec::new();
    for row in client.query_typed(FIRING, &[]).await? {
        let Quieting { quiet, what, again } =
            quieting(row.get(0), &target(&row), row.get(3), row.get(4));
        client.batch_execute(&quiet).await?;
        if let (Some(stream), Some(again)) = (stream, again) {
            deferred::keep(client, stream, (&what, &again), deferred::when_opened()).await?;
        }
        quieted.push(what);
    }
    Ok(quieted)
}

fn target(row: &Row) -> TableName {
    TableName {
        schema: row.get(1),
        name: row.get(2),
    }
}

struct Quieting {
    quiet: String,
    what: String,
    /// At the opening; where it is gone by then, nothing is done.
    again: Option<String>,
}

fn quieting(kind: &str, table: &TableName, name: &str, always: bool) -> Quieting {
    let (verb, mode) = if always {
        ("ENABLE", "ENABLE ALWAYS")
    } else {
        ("DISABLE", "ENABLE REPLICA")
    };
    let (quoted, literal) = (quote_ident(name), quote_literal(name));
    if kind == "EVENT TRIGGER" {
        return Quieting {
            quiet: format!("ALTER EVENT TRIGGER {quoted} {verb}"),
            what: format!("{mode} of event trigger {name}"),
            again: None,
        };
    }
    let relation = format!("pg_catalog.to_regclass({})", quote_literal(&table.sql()));
    let exists = match kind {
        "RULE" => {
            format!("pg_catalog.pg_rewrite WHERE ev_class = {relation} AND rulename = {literal}")
        }
        _ => format!("pg_catalog.pg_trigger WHERE tgrelid = {relation} AND tgname = {literal}"),
    };
    let alter = |mode: &str| format!("ALTER TABLE ONLY {} {mode} {kind} {quoted}", table.sql());
    let body = format!(
        "BEGIN IF EXISTS (SELECT FROM {exists}) THEN {}; END IF; END",
        alter(mode)
    );
    Quieting {
        quiet: alter(verb),
        what: format!("{mode} of {} {name} on {table}", kind.to_lowercase()),
        again: Some(format!("DO {}", quote_literal(&body))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn always_waits_for_the_opening_and_replica_never_fires() {
        let table = TableName {
            schema: "s".into(),
            name: "t".into(),
        };
        let of = |kind, name, always| quieting(kind, &table, name, always);
        let audit = of("TRIGGER", "Audit", true);
        assert_eq!(
            audit.quiet,
            "ALTER TABLE ONLY \"s\".\"t\" ENABLE TRIGGER \"Audit\""
        );
        assert_eq!(audit.what, "ENABLE ALWAYS of trigger Audit on s.t");
        let again = "THEN ALTER TABLE ONLY \"s\".\"t\" ENABLE ALWAYS TRIGGER \"Audit\"";
        assert!(audit.again.is_some_and(|text| text.contains(again)));
        let rule = of("RULE", "r", false);
        assert_eq!(
            rule.quiet,
            "ALTER TABLE ONLY \"s\".\"t\" DISABLE RULE \"r\""
        );
        let event = of("EVENT TRIGGER", "e", true);
        assert_eq!(event.quiet, "ALTER EVENT TRIGGER \"e\" ENABLE");
        assert_eq!(event.again, None);
    }
}
