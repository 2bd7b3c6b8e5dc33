//! The walsender's commands as text, and their answers.
//!
//! PostgreSQL documentation, "Streaming Replication Protocol". The grammar is the walsender's own
//! (`repl_gram.y`): names in double quotes, strings in single quotes without backslash escapes.

use std::fmt::Write as _;

use super::{CreatedSlot, SlotOptions, SystemIdentity};
use crate::pg::quote::{quote_ident, quote_literal};
use crate::pg::{PgError, PgLsn};

/// From this version on the options of a slot stand in parentheses.
const OPTIONS_IN_PARENTHESES: i32 = 150_000;
/// From this version on slots can be kept in step on standbys.
const FAILOVER_SLOTS: i32 = 170_000;

pub(super) fn create_slot(name: &str, options: SlotOptions, server_version: i32) -> String {
    let mut sql = format!("CREATE_REPLICATION_SLOT {}", quote_ident(name));
    if options.temporary {
        sql.push_str(" TEMPORARY");
    }
    sql.push_str(" LOGICAL \"pgoutput\"");
    if server_version < OPTIONS_IN_PARENTHESES {
        sql.push_str(if options.export_snapshot {
            " EXPORT_SNAPSHOT"
        } else {
            " NOEXPORT_SNAPSHOT"
        });
        return sql;
    }
    sql.push_str(if options.export_snapshot {
        " (SNAPSHOT 'export'"
    } else {
        " (SNAPSHOT 'nothing'"
    });
    if options.failover && server_version >= FAILOVER_SLOTS {
        sql.push_str(", FAILOVER true");
    }
    sql.push(')');
    sql
}

/// An earlier session's copy may not be gone yet, so the name has the backend's number.
pub(super) fn copy_slot(name: &str) -> String {
    format!(
        "SELECT slot_name FROM pg_catalog.pg_copy_logical_replication_slot({}, \
         pg_catalog.format('dr_agent_copy_%s', pg_catalog.pg_backend_pid())::name, true)",
        quote_literal(name)
    )
}

pub(super) fn drop_slot(name: &str) -> String {
    format!("DROP_REPLICATION_SLOT {}", quote_ident(name))
}

pub(super) fn start_replication(slot: &str, start: PgLsn, options: &[(&str, &str)]) -> String {
    let mut sql = format!(
        "START_REPLICATION SLOT {} LOGICAL {start}",
        quote_ident(slot)
    );
    for (index, (name, value)) in options.iter().enumerate() {
        let before = if index == 0 { " (" } else { ", " };
        let value = value.replace('\'', "''");
        let _ = write!(sql, "{before}{} '{value}'", quote_ident(name));
    }
    if !options.is_empty() {
        sql.push(')');
    }
    sql
}

type ReplyRow = [Option<String>];

/// `slot_name`.
pub(super) fn copied_slot(row: &ReplyRow) -> Result<String, PgError> {
    match row {
        [Some(name)] => Ok(name.clone()),
        _ => Err(unexpected("pg_copy_logical_replication_slot", "row")),
    }
}

/// `systemid, timeline, xlogpos, dbname`.
pub(super) fn system_identity(row: &ReplyRow) -> Result<SystemIdentity, PgError> {
    match row {
        [Some(system_identifier), Some(timeline), Some(xlogpos), ..] => Ok(SystemIdentity {
            system_identifier: system_identifier
                .parse()
                .map_err(|_| unexpected("IDENTIFY_SYSTEM", "system identifier"))?,
            timeline: timeline
                .parse()
                .map_err(|_| unexpected("IDENTIFY_SYSTEM", "timeline"))?,
            xlogpos: lsn("IDENTIFY_SYSTEM", xlogpos)?,
        }),
        _ => Err(unexpected("IDENTIFY_SYSTEM", "row")),
    }
}

/// `slot_name, consistent_point, snapshot_name, output_plugin`.
pub(super) fn created_slot(row: &ReplyRow) -> Result<CreatedSlot, PgError> {
    match row {
        [Some(name), Some(consistent_point), snapshot_name, ..] => Ok(CreatedSlot {
            name: name.clone(),
            consistent_point: lsn("CREATE_REPLICATION_SLOT", consistent_point)?,
            snapshot_name: snapshot_name.clone(),
        }),
        _ => Err(unexpected("CREATE_REPLICATION_SLOT", "row")),
    }
}

fn lsn(command: &str, text: &str) -> Result<PgLsn, PgError> {
    text.parse().map_err(|_| unexpected(command, "LSN"))
}

fn unexpected(command: &str, what: &str) -> PgError {
    PgError::Protocol(format!("{command}: the {what} is not as documented"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_is_asked_in_its_own_grammar() {
        let options = SlotOptions {
            temporary: false,
            failover: true,
            export_snapshot: true,
        };
        let table = [
            (
                140_011,
                r#"CREATE_REPLICATION_SLOT "s" LOGICAL "pgoutput" EXPORT_SNAPSHOT"#,
            ),
            (
                150_018,
                r#"CREATE_REPLICATION_SLOT "s" LOGICAL "pgoutput" (SNAPSHOT 'export')"#,
            ),
            (
                170_000,
                r#"CREATE_REPLICATION_SLOT "s" LOGICAL "pgoutput" (SNAPSHOT 'export', FAILOVER true)"#,
            ),
        ];
        for (version, expected) in table {
            assert_eq!(create_slot("s", options, version), expected);
        }
        let temporary = SlotOptions {
            temporary: true,
            ..SlotOptions::default()
        };
        assert_eq!(
            create_slot("s", temporary, 150_000),
            r#"CREATE_REPLICATION_SLOT "s" TEMPORARY LOGICAL "pgoutput" (SNAPSHOT 'nothing')"#
        );
    }

    #[test]
    fn plugin_options_are_quoted() {
        assert_eq!(
            start_replication(
                "s",
                PgLsn::from(0x16_B374_D848),
                &[("proto_version", "2"), ("publication_names", r#""it's""#)]
            ),
            r#"START_REPLICATION SLOT "s" LOGICAL 16/B374D848 ("proto_version" '2', "publication_names" '"it''s"')"#
        );
        assert_eq!(
            start_replication("s", PgLsn::from(0), &[]),
            r#"START_REPLICATION SLOT "s" LOGICAL 0/0"#
        );
    }
}
