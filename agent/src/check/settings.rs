//! ● What is judged about a server as a whole: version, settings, limits, clock.
//!
//! Pure: [`ServerFacts`] and numbers in, findings out.

use crate::error::{Classify, chain};
use crate::pg::PgError;

use super::finding::{Finding, FindingPlace, counted};
use super::server::{ServerFacts, Skew, SlotFacts};

/// Oldest and newest major version this program is tested with.
const MAJOR_MIN: i32 = 14;
const MAJOR_MAX: i32 = 18;

/// Clocks further apart than this many seconds falsify the lag.
const SKEW_SECONDS_MAX: f64 = 1.0;

/// A `max_slot_wal_keep_size` below this many megabytes is used up by an ordinary night of
/// maintenance on the far side.
const SLOT_WAL_MEGABYTES_MIN: i64 = 10 * 1024;

/// Why a server or database could not be reached, under a code that tells the cases apart.
pub(super) fn unreachable(at: &FindingPlace, error: &PgError) -> Finding {
    let code = match (error, error.sqlstate()) {
        (PgError::Tls { .. }, _) => "tls",
        (PgError::Password { .. }, _) | (_, Some("28P01")) => "password",
        (_, Some("28000")) => "pg_hba",
        (_, Some("3D000")) => "database",
        (_, Some("53300")) => "too_many_connections",
        _ => "connect",
    };
    let hint = error.hint().unwrap_or_else(|| match code {
        "tls" => {
            "compare sslmode and sslrootcert of the URL with the server's ssl settings".to_owned()
        }
        "password" => "the password comes from password_file, PGPASSWORD or ~/.pgpass".to_owned(),
        _ => "is the server up, and do host and port of the URL reach it from here? \
              try `psql` with the same URL"
            .to_owned(),
    });
    at.error(code, chain(error)).hint(hint)
}

/// Part of the check failed; what it would have found is unknown.
pub(super) fn failed(at: &FindingPlace, doing: &str, error: &PgError) -> Finding {
    let finding = at.error(
        "check_failed",
        format!("could not {doing}: {}", chain(error)),
    );
    match error.hint() {
        Some(hint) => finding.hint(hint),
        None => finding,
    }
}

/// The version, and whether the server takes writes.
pub(super) fn version(at: &FindingPlace, server: &ServerFacts) -> Vec<Finding> {
    let major = server.major();
    let text = format!("PostgreSQL {}", server.version);
    let mut findings = vec![if major < MAJOR_MIN {
        at.error("server_version", format!("{text}: too old"))
            .hint(format!(
                "dr-agent needs PostgreSQL {MAJOR_MIN} to {MAJOR_MAX}"
            ))
    } else if major > MAJOR_MAX {
        at.error(
            "server_version",
            format!("{text}: newer than this dr-agent knows, which refuses it"),
        )
        .hint(format!(
            "look for a newer dr-agent; this one knows {MAJOR_MIN} to {MAJOR_MAX}"
        ))
    } else {
        at.ok("server_version", text)
    }];
    if server.in_recovery {
        findings.push(
            at.error("in_recovery", "is a physical standby and takes no writes")
                .hint("point the URL at the primary; with several hosts add target_session_attrs=read-write"),
        );
    }
    findings
}

/// Settings of the source that replication stands on. `wanted` is the names of our slots, one per
/// database; `walsenders` counts everybody's. `apart`: another process than the one that tails the slots copies.
pub(super) fn source_limits(
    at: &FindingPlace,
    server: &ServerFacts,
    slots: &[SlotFacts],
    walsenders: i64,
    wanted: &[String],
    apart: bool,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let level = server.setting("wal_level");
    findings.push(if level == "logical" {
        at.ok("wal_level", "logical")
    } else {
        at.error("wal_level", format!("is \"{level}\", not \"logical\""))
            .hint("ALTER SYSTEM SET wal_level = 'logical'; then restart the source")
    });

    let ours = slots.iter().filter(|slot| wanted.contains(&slot.name));
    let missing = wanted.len() - ours.clone().count();
    let limit = server.number("max_replication_slots").unwrap_or(0);
    let free = limit - count(slots.len());
    // Each database is copied through a temporary slot, for as long as that takes; and a new slot begins where one was.
    let copies = if apart { wanted.len() } else { missing };
    findings.push(capacity(
        at,
        "max_replication_slots",
        limit,
        free,
        (count(missing), count(copies)),
    ));

    let streaming = ours.filter(|slot| slot.active).count();
    let limit = server.number("max_wal_senders").unwrap_or(0);
    // Whoever copies beside a process that streams has a walsender of its own.
    let copies = if apart { count(wanted.len()) } else { 0 };
    findings.push(capacity(
        at,
        "max_wal_senders",
        limit,
        limit - walsenders,
        (count(wanted.len() - streaming), copies),
    ));
    findings
}

/// `needed` for good, and `copies` for a while.
fn capacity(
    at: &FindingPlace,
    code: &'static str,
    limit: i64,
    free: i64,
    (needed, copies): (i64, i64),
) -> Finding {
    let free = free.max(0);
    let text = match copies {
        0 => format!("{free} of {limit} free, {needed} more needed"),
        _ => format!(
            "{free} of {limit} free, {needed} more needed, and {copies} while databases are copied from here"
        ),
    };
    if needed > free {
        let enough = limit + (needed - free);
        at.error(code, text).hint(format!(
            "ALTER SYSTEM SET {code} = {} or more (one per database, and one to spare); \
             then restart the source",
            enough + 1
        ))
    } else if copies > free - needed {
        let enough = limit + (needed + copies - free);
        let hint = format!(
            "each database is copied through a temporary slot, the first time and when tables are added; what gets none \
             waits. ALTER SYSTEM SET {code} = {enough} or more; then restart the source"
        );
        match free - needed {
            0 if needed > 0 => at.error(code, format!("{text}: nothing can begin")),
            0 => at.warning(code, format!("{text}: nothing can be copied from here")),
            _ => at.note(code, format!("{text}: not all at the same time")),
        }
        .hint(hint)
    } else if needed > 0 && needed == free {
        at.note(code, format!("{text}: none to spare"))
            .hint("tables added later are copied through a temporary slot; keep one free")
    } else {
        at.ok(code, text)
    }
}

/// Settings of the source under which a slot is lost, holds WAL for ever, or holds up commits.
pub(super) fn source_risks(at: &FindingPlace, server: &ServerFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    match server.number("max_slot_wal_keep_size") {
        Some(-1) => findings.push(
            at.note(
                "max_slot_wal_keep_size",
                "is unlimited: while the agent or the replica is down, WAL fills the source's disk",
            )
            .hint("watch dr_agent_source_disk_full_seconds, or set a limit that covers your longest outage"),
        ),
        Some(megabytes) if megabytes < SLOT_WAL_MEGABYTES_MIN => findings.push(
            at.note(
                "max_slot_wal_keep_size",
                format!("is {megabytes} MB: the slot is lost after that much WAL, and every table is copied again"),
            )
            .hint("ALTER SYSTEM SET max_slot_wal_keep_size = what the disk can spare; SELECT pg_reload_conf()"),
        ),
        Some(megabytes) => {
            findings.push(at.ok("max_slot_wal_keep_size", format!("{megabytes} MB")));
        }
        None => {}
    }
    if server
        .number("idle_replication_slot_timeout")
        .is_some_and(|timeout| timeout != 0)
    {
        findings.push(
            at.warning(
                "idle_replication_slot_timeout",
                "is set: an agent that is down for that long loses its slot",
            )
            .hint("ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf()"),
        );
    }
    if server.number("wal_sender_timeout") == Some(0) {
        findings.push(
            at.warning(
                "wal_sender_timeout",
                "is 0: after a network cut the dead connection keeps the slot, and the agent cannot resume",
            )
            .hint("ALTER SYSTEM SET wal_sender_timeout = '60s'; SELECT pg_reload_conf()"),
        );
    }
    let standbys = server.setting("synchronous_standby_names");
    if standbys.contains('*') {
        findings.push(
            at.warning(
                "synchronous_standby_names",
                format!("is \"{standbys}\" and takes the agent for a standby: commits on the source may wait for it"),
            )
            .hint("name the physical standbys instead of *; SELECT pg_reload_conf()"),
        );
    }
    findings
}

/// Whether the clock can be trusted for the lag.
pub(super) fn clock(at: &FindingPlace, skew: Skew) -> Finding {
    let Skew {
        seconds,
        uncertainty,
    } = skew;
    let direction = if seconds < 0.0 { "behind" } else { "ahead of" };
    let text = format!(
        "{:.3} s {direction} this machine's (± {uncertainty:.3} s)",
        seconds.abs()
    );
    if skew.exceeds(SKEW_SECONDS_MAX) {
        at.warning(
            "clock_skew",
            format!("the clock is {text}: the lag is wrong by as much"),
        )
        .hint("run NTP (chrony, systemd-timesyncd) on both machines")
    } else {
        at.ok("clock_skew", format!("the clock is {text}"))
    }
}

/// Settings of the replica, which is to apply on `lanes` lanes in each database.
pub(super) fn replica_settings(
    at: &FindingPlace,
    server: &ServerFacts,
    source: &ServerFacts,
    lanes: u16,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let limit = server.number("max_prepared_transactions");
    if lanes > 1 && limit.is_some_and(|limit| limit < i64::from(lanes)) {
        let limit = limit.unwrap_or_default();
        let possible = if limit < 2 { 1 } else { limit };
        findings.push(
            at.warning(
                "max_prepared_transactions",
                format!("is {limit}: large batches are applied on {possible} of {lanes} lanes"),
            )
            .hint(
                "set it to at least replica.lanes times the number of databases and restart the \
                 replica, or set replica.lanes = 1",
            ),
        );
    }
    if server.major() < source.major() {
        findings.push(
            at.warning(
                "replica_older",
                format!(
                    "PostgreSQL {} is older than the source's {}: a schema that uses newer features will not load",
                    server.major(),
                    source.major()
                ),
            )
            .hint("upgrade the replica to the source's major version or a newer one"),
        );
    }
    findings
}

/// Whether both URLs lead to the same server, or to two copies of one.
pub(super) fn same_server(
    at: &FindingPlace,
    source: &ServerFacts,
    replica: &ServerFacts,
) -> Option<Finding> {
    let (Some(one), Some(other)) = (&source.system_identifier, &replica.system_identifier) else {
        return Some(at.note(
            "system_identifier",
            "cannot be read on one side; whether the two are different servers was not compared",
        ));
    };
    if one != other {
        return Some(at.ok(
            "system_identifier",
            "source and replica are different clusters",
        ));
    }
    // A running server's start time has microseconds: two servers do not share it by chance.
    let finding = if (source.started_at - replica.started_at).abs() < 1e-6 {
        at.error(
            "same_server",
            "source.url and replica.url lead to the same server",
        )
        .hint("correct replica.url: replicating a server into itself protects nothing")
    } else {
        at.warning(
            "physical_copy",
            format!("source and replica have the same system identifier {one}: one is a physical copy of the other"),
        )
        .hint("is it really another server? a replica is best a cluster of its own, made by initdb")
    };
    Some(finding)
}

/// Whether our role may stream from the source.
pub(super) fn replication_role(at: &FindingPlace, server: &ServerFacts) -> Finding {
    let role = &server.role;
    if role.superuser || role.replication {
        let why = if role.superuser {
            "is superuser"
        } else {
            "has REPLICATION"
        };
        return at.ok("role_replication", format!("role {} {why}", role.name));
    }
    at.error(
        "role_replication",
        format!("role {} has neither REPLICATION nor superuser", role.name),
    )
    .hint(format!(
        "ALTER ROLE {} REPLICATION; (on RDS: GRANT rds_replication TO {})",
        crate::pg::quote::quote_ident(&role.name),
        crate::pg::quote::quote_ident(&role.name),
    ))
}

/// Says "3 databases: a, b, c".
pub(super) fn selected(at: &FindingPlace, names: &[String]) -> Finding {
    if names.is_empty() {
        at.error("databases", "there is no database to replicate")
            .hint("source.databases = [\"*\"] takes every database that allows connections and is no template")
    } else {
        at.ok(
            "databases",
            format!(
                "{}: {}",
                counted(names.len(), "database"),
                super::finding::some_of(names)
            ),
        )
    }
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::finding::{FindingSide, Severity};
    use super::*;
    use crate::pg::ServerError;

    fn at() -> FindingPlace {
        FindingPlace::server(FindingSide::Source)
    }

    fn server(settings: &[(&str, &str)]) -> ServerFacts {
        ServerFacts {
            version_num: 150_008,
            version: "15.8".to_owned(),
            settings: settings
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            ..ServerFacts::default()
        }
    }

    fn codes(findings: &[Finding]) -> Vec<(Severity, &'static str)> {
        findings.iter().map(|f| (f.severity, f.code)).collect()
    }

    #[test]
    fn versions_outside_14_to_18_are_told_apart() {
        for (num, expected) in [
            (130_012, Severity::Error),
            (140_000, Severity::Ok),
            (180_001, Severity::Ok),
            (190_000, Severity::Error),
        ] {
            let server = ServerFacts {
                version_num: num,
                ..server(&[])
            };
            assert_eq!(version(&at(), &server)[0].severity, expected, "{num}");
        }
    }

    #[test]
    fn a_wrong_password_is_not_called_an_unreachable_server() {
        let refused = |sqlstate: &str| {
            PgError::Server(Box::new(ServerError {
                sqlstate: sqlstate.to_owned(),
                ..ServerError::default()
            }))
        };
        assert_eq!(unreachable(&at(), &refused("28P01")).code, "password");
        assert_eq!(unreachable(&at(), &refused("28000")).code, "pg_hba");
        assert_eq!(unreachable(&at(), &refused("3D000")).code, "database");
        assert_eq!(unreachable(&at(), &PgError::Closed).code, "connect");
        let tls = PgError::Tls {
            server: "h".to_owned(),
            reason: "expired".to_owned(),
        };
        assert_eq!(unreachable(&at(), &tls).code, "tls");
        assert!(unreachable(&at(), &PgError::Closed).hint.is_some());
    }

    #[test]
    fn slots_that_are_already_ours_need_no_room() {
        let settings = [
            ("wal_level", "logical"),
            ("max_replication_slots", "2"),
            ("max_wal_senders", "1"),
        ];
        let wanted = ["dr_a".to_owned(), "dr_b".to_owned()];
        let slot = |name: &str, active| SlotFacts {
            name: name.to_owned(),
            active,
            ..SlotFacts::default()
        };
        let both = [slot("dr_a", true), slot("dr_b", false)];
        let findings = source_limits(&at(), &server(&settings), &both, 1, &wanted, false);
        assert_eq!(
            codes(&findings),
            [
                (Severity::Ok, "wal_level"),
                (Severity::Ok, "max_replication_slots"),
                (Severity::Error, "max_wal_senders"),
            ]
        );
        let foreign = [slot("other", true), slot("dr_a", false)];
        let findings = source_limits(&at(), &server(&settings), &foreign, 0, &wanted, false);
        assert_eq!(findings[1].severity, Severity::Error);
        assert!(
            findings[1].hint.as_ref().unwrap().contains("= 4"),
            "{findings:?}"
        );
    }

    #[test]
    fn whoever_copies_needs_slots_for_a_while() {
        let severity = |limit: &str, apart: bool| {
            let settings = [
                ("wal_level", "logical"),
                ("max_replication_slots", limit),
                ("max_wal_senders", "20"),
            ];
            let wanted = ["dr_a".to_owned(), "dr_b".to_owned()];
            let slot = SlotFacts {
                name: "dr_a".to_owned(),
                ..SlotFacts::default()
            };
            let found = source_limits(&at(), &server(&settings), &[slot], 0, &wanted, apart);
            found[1].severity
        };
        // One for good, which cannot begin without another; apply copies both anew at worst.
        for (limit, direct, apart) in [
            ("1", Severity::Error, Severity::Error),
            ("2", Severity::Error, Severity::Error),
            ("3", Severity::Ok, Severity::Note),
            ("4", Severity::Ok, Severity::Ok),
        ] {
            assert_eq!(severity(limit, false), direct, "{limit}");
            assert_eq!(severity(limit, true), apart, "{limit}");
        }
    }

    #[test]
    fn a_source_that_would_lose_the_slot_or_wait_for_us_is_reported() {
        let risky = server(&[
            ("max_slot_wal_keep_size", "1024"),
            ("idle_replication_slot_timeout", "60"),
            ("wal_sender_timeout", "0"),
            ("synchronous_standby_names", "ANY 1 (*)"),
        ]);
        assert_eq!(
            codes(&source_risks(&at(), &risky)),
            [
                (Severity::Note, "max_slot_wal_keep_size"),
                (Severity::Warning, "idle_replication_slot_timeout"),
                (Severity::Warning, "wal_sender_timeout"),
                (Severity::Warning, "synchronous_standby_names"),
            ]
        );
        let calm = server(&[
            ("max_slot_wal_keep_size", "204800"),
            ("wal_sender_timeout", "60000"),
            ("synchronous_standby_names", ""),
        ]);
        assert_eq!(
            codes(&source_risks(&at(), &calm)),
            [(Severity::Ok, "max_slot_wal_keep_size")]
        );
    }

    #[test]
    fn a_replica_that_is_the_source_is_an_error() {
        let with = |id: &str, started_at| ServerFacts {
            system_identifier: Some(id.to_owned()),
            started_at,
            ..server(&[])
        };
        let severity = |one: &ServerFacts, other: &ServerFacts| {
            same_server(&at(), one, other).unwrap().severity
        };
        assert_eq!(severity(&with("1", 5.0), &with("1", 5.0)), Severity::Error);
        assert_eq!(
            severity(&with("1", 5.0), &with("1", 6.0)),
            Severity::Warning
        );
        assert_eq!(severity(&with("1", 5.0), &with("2", 5.0)), Severity::Ok);
        assert_eq!(severity(&with("1", 5.0), &server(&[])), Severity::Note);
    }

    #[test]
    fn an_older_replica_is_a_warning() {
        let replica = ServerFacts {
            version_num: 140_010,
            ..server(&[("max_prepared_transactions", "0")])
        };
        assert_eq!(
            codes(&replica_settings(&at(), &replica, &server(&[]), 4)),
            [
                (Severity::Warning, "max_prepared_transactions"),
                (Severity::Warning, "replica_older"),
            ]
        );
    }

    #[test]
    fn lanes_need_prepared_transactions() {
        let found = |limit, lanes| {
            let replica = server(&[("max_prepared_transactions", limit)]);
            replica_settings(&at(), &replica, &server(&[]), lanes).len()
        };
        assert_eq!(found("0", 1), 0);
        assert_eq!(found("3", 4), 1);
        assert_eq!(found("4", 4), 0);
    }

    #[test]
    fn only_replication_or_superuser_may_stream() {
        let mut server = server(&[]);
        assert_eq!(replication_role(&at(), &server).severity, Severity::Error);
        server.role.replication = true;
        assert_eq!(replication_role(&at(), &server).severity, Severity::Ok);
    }
}
