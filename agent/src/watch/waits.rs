//! What our sessions on one server wait for, for longer than a moment, and who holds it.
//!
//! Creating a slot waits for every transaction that runs on the server, in any database, prepared ones included; altering a
//! table, copying and applying wait for locks. PostgreSQL says nothing about it to whoever waits, so it is read beside.
//!
//! # Invariants
//! - A wait is said once when it is first seen, and in `status` for as long as it lasts.
//! - No text of a statement is read: it may hold values.
//!
//! # What it does not do
//! It ends nobody's session. Waits for the network or for a person are the pipelines' to say.

use tokio_postgres::{Client, Row};

use super::WatchedSide;
use crate::names::stream::APPLICATION_PREFIX;
use crate::pg::PgError;
use crate::time::Micros;

/// A wait that gives up after a while and begins anew is one wait.
const GONE_AFTER: Micros = 10_000_000;

/// One session of ours that waits.
#[derive(Clone, Debug, PartialEq)]
pub struct Wait {
    /// `application_name` of whoever waits.
    application: String,
    /// One sentence.
    pub text: String,
    /// What makes it another one.
    key: String,
    /// When it was last seen.
    seen: Micros,
}

impl Wait {
    pub(super) fn is_of(&self, stream: &str) -> bool {
        let name = self.application.strip_prefix(APPLICATION_PREFIX);
        let Some((_, of)) = name.and_then(|name| name.split_once(':')) else {
            return false;
        };
        // PostgreSQL cuts the name.
        of == stream || (self.application.len() >= 63 && stream.starts_with(of))
    }

    pub(super) fn is_fresh(&self, now: Micros) -> bool {
        now - self.seen <= GONE_AFTER
    }
}

/// Takes over what was found, and says what is new.
pub(super) fn say(known: &mut Vec<Wait>, found: Vec<FoundWait>, side: WatchedSide, now: Micros) {
    for found in found {
        let key = found.key();
        let before = known.iter().position(|wait| wait.key == key);
        let wait = Wait {
            text: found.text(side),
            application: found.application,
            key,
            seen: now,
        };
        match before {
            Some(at) => known[at] = wait,
            None => {
                tracing::warn!(side = side.as_str(), session = %wait.application, "{}", wait.text);
                known.push(wait);
            }
        }
    }
    known.retain(|wait| wait.is_fresh(now));
}

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct FoundWait {
    application: String,
    /// What kind of lock, and of what.
    lock: String,
    seconds: f64,
    /// The holders.
    holders: Vec<String>,
}

impl FoundWait {
    fn key(&self) -> String {
        format!("{} {} {:?}", self.application, self.lock, self.holders)
    }

    /// One sentence, with what to do.
    pub(crate) fn text(&self, side: WatchedSide) -> String {
        let role = self.application.strip_prefix(APPLICATION_PREFIX);
        let role = role.and_then(|name| name.split(':').next());
        let held = match self.holders.as_slice() {
            [] => "held by a session that cannot be seen from here".to_owned(),
            holders => format!("held by {}", holders.join(" and by ")),
        };
        format!(
            "waits on the {} ({}) for {:.0} s now: {}, {held}; it goes on by itself once that transaction has ended",
            side.as_str(),
            role.unwrap_or("session"),
            self.seconds,
            self.lock,
        )
    }
}

/// Looks who waits; cheap where nobody does.
pub(crate) async fn look(client: &Client) -> Result<Vec<FoundWait>, PgError> {
    const WHO: &str = "
        SELECT pid FROM pg_catalog.pg_stat_activity
         WHERE wait_event_type = 'Lock' AND starts_with(application_name, $1)";
    let rows = client.query(WHO, &[&APPLICATION_PREFIX]).await?;
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let pids: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    let rows = client.query(WAITS, &[&pids]).await?;
    Ok(rows.iter().map(found).collect())
}

/// Who waits for what since when, and who holds it. A prepared transaction has no session: `pg_blocking_pids` says 0, and
/// its locks have no pid. No OID is resolved to a name that a drop could take away.
const WAITS: &str = "
    SELECT a.application_name, w.locktype, w.mode,
           coalesce(w.transactionid::text, c.relname, w.relation::text, ''), coalesce(d.datname, ''),
           extract(epoch FROM clock_timestamp() - w.waitstart)::float8,
           (SELECT array_agg(h.text ORDER BY h.since)
              FROM (SELECT format('pid %s (%s, user %s, %s, transaction since %s)', s.pid,
                                  coalesce('database ' || s.datname, 'no database'), s.usename, coalesce(s.state, s.backend_type),
                                  coalesce(s.xact_start::timestamptz(0)::text, 'unknown')),
                           s.xact_start
                      FROM pg_stat_activity s WHERE s.pid = ANY (pg_blocking_pids(w.pid))
                    UNION ALL
                    SELECT format('the prepared transaction %L (database %s, owner %s, since %s): COMMIT PREPARED or ROLLBACK '
                                  'PREPARED is for whoever prepared it', x.gid, x.database, x.owner, x.prepared::timestamptz(0)),
                           x.prepared
                      FROM pg_prepared_xacts x
                     WHERE 0 = ANY (pg_blocking_pids(w.pid))
                       AND (x.transaction = w.transactionid
                            OR EXISTS (SELECT FROM pg_locks h
                                        WHERE h.granted AND h.pid IS NULL
                                          AND split_part(h.virtualtransaction, '/', 2) = x.transaction::text
                                          AND (h.locktype, h.database, h.relation) IS NOT DISTINCT FROM
                                              (w.locktype, w.database, w.relation)))
                   ) AS h (text, since))
      FROM pg_locks w
      JOIN pg_stat_activity a ON a.pid = w.pid
      LEFT JOIN pg_class c ON c.oid = w.relation
           AND w.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      LEFT JOIN pg_database d ON d.oid = coalesce(nullif(w.database, 0), a.datid)
     WHERE NOT w.granted AND w.pid = ANY ($1) AND w.waitstart < clock_timestamp() - interval '1 second'";

fn found(row: &Row) -> FoundWait {
    let (kind, mode): (&str, &str) = (row.get(1), row.get(2));
    let (what, database): (&str, &str) = (row.get(3), row.get(4));
    let lock = match kind {
        "transactionid" => format!("for transaction {what} to end"),
        "relation" => format!("for {mode} on relation {what} of database {database}"),
        other => format!("for {mode} on {other} {what} of database {database}"),
    };
    FoundWait {
        application: row.get(0),
        lock,
        seconds: row.get(5),
        holders: row.get::<_, Option<Vec<String>>>(6).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(application: &str, seconds: f64) -> FoundWait {
        FoundWait {
            application: application.to_owned(),
            lock: "for transaction 745 to end".to_owned(),
            seconds,
            holders: vec!["pid 4711 (database other, user app)".to_owned()],
        }
    }

    #[test]
    fn a_wait_is_kept_while_it_lasts_and_forgotten_afterwards() {
        let mut known = Vec::new();
        for second in 0..20 {
            let now = second * 1_000_000;
            let waits = vec![found("dr_agent:setup:dr_agent_app", 2.0)];
            say(&mut known, waits, WatchedSide::Source, now);
            assert_eq!(known.len(), 1);
        }
        let text = &known[0].text;
        for word in ["source", "setup", "745", "4711", "other"] {
            assert!(text.contains(word), "{word} in {text}");
        }
        say(&mut known, Vec::new(), WatchedSide::Source, 29_000_000);
        assert!(known[0].is_of("dr_agent_app") && !known[0].is_of("dr_agent_ap"));
        say(&mut known, Vec::new(), WatchedSide::Source, 30_000_000);
        assert!(known.is_empty());
    }

    #[test]
    fn a_name_that_was_cut_is_still_found() {
        let stream = format!("dr_agent_{}", "x".repeat(50));
        let mut application = format!("dr_agent:setup:{stream}");
        application.truncate(63);
        let mut known = Vec::new();
        say(
            &mut known,
            vec![found(&application, 2.0)],
            WatchedSide::Source,
            0,
        );
        assert!(known[0].is_of(&stream));
    }
}
