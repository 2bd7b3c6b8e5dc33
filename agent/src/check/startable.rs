//! ● What lets every part of the check be content and still keeps `run` from working: room for connections and locks, libraries,
//! output plugins, features of a newer PostgreSQL.
//!
//! Pure: what was learned of both servers comes in, findings go out.

use super::finding::{Finding, FindingPlace};
use super::server::ServerFacts;

/// Sessions of a database on the replica beside its lanes: the one that holds the right to the stream, and one for what comes and goes.
const BESIDE_LANES: i64 = 2;

/// Libraries that are of use only when they are preloaded, and whose extension can be created without.
const CREATED_WITHOUT: [&str; 5] = [
    "pg_stat_statements",
    "pg_wait_sampling",
    "pg_stat_kcache",
    "pg_qualstats",
    "pg_prewarm",
];

/// Extensions that are in one database of a server only: the setting that names it, and its default.
const IN_ONE_DATABASE: [(&str, &str, &str); 1] = [("pg_cron", "cron.database_name", "postgres")];

/// Whether the replica has room for the sessions of so many databases.
pub(super) fn connections(
    at: &FindingPlace,
    replica: &ServerFacts,
    databases: usize,
    lanes: u16,
) -> Option<Finding> {
    let all = replica.number("max_connections")?;
    let reserved = match replica.role.superuser {
        true => 0,
        false => ["superuser_reserved_connections", "reserved_connections"]
            .iter()
            .filter_map(|name| replica.number(name))
            .sum(),
    };
    let limit = match replica.role.connection_limit {
        limit if limit >= 0 => (all - reserved).min(i64::from(limit)),
        _ => all - reserved,
    };
    let databases = i64::try_from(databases).unwrap_or(i64::MAX);
    let needed = databases.saturating_mul(i64::from(lanes) + BESIDE_LANES);
    if needed <= limit {
        return Some(at.ok(
            "connections",
            format!("{needed} of {limit} are needed at most"),
        ));
    }
    let finding = at.error(
        "connections",
        format!("{needed} are needed ({lanes} lanes and {BESIDE_LANES} more for each database), the role may have {limit}"),
    );
    Some(finding.hint(
        "raise max_connections (or the role's CONNECTION LIMIT) on the replica, or lower replica.lanes",
    ))
}

/// How many locks a server can hold at a time.
fn lock_table(server: &ServerFacts) -> Option<i64> {
    let per = server.number("max_locks_per_transaction")?;
    let number = |name| server.number(name).unwrap_or(0);
    let sessions = number("max_connections")
        + number("autovacuum_max_workers")
        + number("max_worker_processes")
        + number("max_wal_senders")
        + number("max_prepared_transactions");
    Some(per * sessions)
}

/// Whether the lock table has room for one transaction that locks so many relations: `pg_dump` on the source, the creation of the
/// schema on the replica.
pub(super) fn locks(at: &FindingPlace, server: &ServerFacts, relations: i64) -> Option<Finding> {
    let room = lock_table(server)?;
    if relations <= room / 2 {
        return None;
    }
    let text = format!(
        "one transaction of the copy locks {relations} relations, the lock table holds about {room} for everybody"
    );
    let finding = match relations <= room {
        true => at.warning("locks", text),
        false => at.error("locks", text),
    };
    Some(finding.hint(format!(
        "raise max_locks_per_transaction to {} and restart the server",
        lock_setting(server, relations)
    )))
}

fn lock_setting(server: &ServerFacts, relations: i64) -> i64 {
    let per = server.number("max_locks_per_transaction").unwrap_or(64);
    let room = lock_table(server).unwrap_or(1).max(1);
    // Room for as many again.
    ((relations.saturating_mul(2).saturating_mul(per)) / room + 1).max(per)
}

/// Whether an extension of the source needs a library that the replica does not preload.
pub(super) fn preloaded(
    at: &FindingPlace,
    name: &str,
    source: &ServerFacts,
    replica: &ServerFacts,
) -> Option<Finding> {
    let has = |server: &ServerFacts| {
        let list = server.settings.get("shared_preload_libraries")?;
        Some(libraries(list).any(|library| library == name))
    };
    if has(source) != Some(true) {
        return None;
    }
    let missing = "is preloaded on the source and not on the replica";
    let finding = match has(replica) {
        Some(true) => return None,
        None => at.note(
            "extension_preload",
            "is preloaded on the source; whether it is on the replica, this role may not see (pg_read_all_settings)",
        ),
        Some(false) if CREATED_WITHOUT.contains(&name) => at.warning("extension_preload", missing),
        Some(false) => at.error(
            "extension_preload",
            format!("{missing}: it cannot be created there"),
        ),
    };
    Some(finding.on(name).hint(format!(
        "add {name} to shared_preload_libraries of the replica and restart it"
    )))
}

/// Whether an extension can be created in this database of the replica, where a server has it in one database only.
pub(super) fn in_one_database(
    at: &FindingPlace,
    name: &str,
    database: &str,
    replica: &ServerFacts,
) -> Option<Finding> {
    let (_, setting, default) = IN_ONE_DATABASE
        .iter()
        .find(|(extension, ..)| *extension == name)?;
    let only = replica
        .settings
        .get(*setting)
        .map_or(*default, String::as_str);
    if only == database {
        return None;
    }
    let finding = at.error(
        "extension_database",
        format!("can be created in database \"{only}\" of the replica only, by {setting} there"),
    );
    Some(finding.on(name).hint(format!(
        "set {setting} = '{database}' on the replica and restart it"
    )))
}

/// The names of a list of libraries, without directories.
fn libraries(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(|library| {
        let library = library.trim().trim_matches(['"', '\'']);
        library.rsplit('/').next().unwrap_or(library)
    })
}

/// Whether the source lets `pgoutput` decode. The setting came in November 2026; servers without it let everything.
pub(super) fn output_plugin(at: &FindingPlace, source: &ServerFacts) -> Option<Finding> {
    const SETTING: &str = "output_plugin_libraries";
    let list = source.settings.get(SETTING)?;
    let allows = libraries(list).any(|library| matches!(library, "pgoutput" | "*"));
    if allows {
        return Some(at.ok(SETTING, "allows pgoutput"));
    }
    let finding = at.error(
        SETTING,
        format!("is '{list}': pgoutput, which dr-agent reads, may not be used"),
    );
    Some(finding.hint(
        "add pgoutput: ALTER SYSTEM SET output_plugin_libraries = …, then SELECT pg_reload_conf()",
    ))
}

/// A kind of object that came with a version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Feature {
    /// The major version that brought it.
    pub(super) since: i32,
    /// What it is.
    pub(super) what: String,
    /// One object that has it.
    pub(super) example: String,
}

/// What the source has and an older replica cannot create.
pub(super) fn newer_features(
    at: &FindingPlace,
    features: &[Feature],
    replica: &ServerFacts,
) -> Vec<Finding> {
    let newer = features
        .iter()
        .filter(|feature| feature.since > replica.major());
    newer
        .map(|feature| {
            at.error(
                "newer_feature",
                format!(
                    "{} came with PostgreSQL {}, the replica is {}: the schema cannot be created there",
                    feature.what,
                    feature.since,
                    replica.major()
                ),
            )
            .on(&feature.example)
            .hint("upgrade the replica to the source's major version")
        })
        .collect()
}

/// A source without an encoding: bytes that are no text of any.
pub(super) fn encoding(at: &FindingPlace, encoding: &str) -> Option<Finding> {
    (encoding == "SQL_ASCII").then(|| {
        at.error(
            "encoding",
            "is SQL_ASCII, which says nothing about what its bytes are: the first value that is not ASCII stops replication",
        )
        .hint("convert the database: dump it, and restore it into one with the encoding that its clients used (pg_dump -E)")
    })
}

/// Programs whose dumps an older minor release of the replica may not understand.
pub(super) fn tools(
    at: &FindingPlace,
    tools: (i32, i32),
    replica: &ServerFacts,
) -> Option<Finding> {
    let minor = replica.version_num % 10_000;
    if tools.0 != replica.major() || tools.1 <= minor {
        return None;
    }
    let finding = at.warning(
        "pg_tools_newer",
        format!(
            "pg_dump {}.{} is newer than the replica's {}: what it writes may need functions of that minor release",
            tools.0, tools.1, replica.version
        ),
    );
    Some(finding.hint("update the replica to the newest minor release"))
}

#[cfg(test)]
mod tests {
    use super::super::finding::{FindingSide, Severity};
    use super::*;

    fn at() -> FindingPlace {
        FindingPlace::server(FindingSide::Replica)
    }

    fn server(version_num: i32, settings: &[(&str, &str)]) -> ServerFacts {
        let mut server = ServerFacts {
            version_num,
            ..ServerFacts::default()
        };
        server.role.connection_limit = -1;
        server.settings = settings
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        server
    }

    #[test]
    fn sessions_of_all_databases_must_fit() {
        let replica = server(
            150_000,
            &[
                ("max_connections", "100"),
                ("superuser_reserved_connections", "3"),
            ],
        );
        let severity = |databases| connections(&at(), &replica, databases, 4).unwrap().severity;
        assert_eq!(severity(16), Severity::Ok);
        assert_eq!(severity(17), Severity::Error);
        let mut limited = replica.clone();
        limited.role.connection_limit = 5;
        assert_eq!(
            connections(&at(), &limited, 1, 4).unwrap().severity,
            Severity::Error
        );
    }

    #[test]
    fn a_lock_table_must_hold_the_whole_schema() {
        let small = server(
            150_000,
            &[
                ("max_locks_per_transaction", "10"),
                ("max_connections", "20"),
            ],
        );
        let severity = |relations| locks(&at(), &small, relations).map(|found| found.severity);
        assert_eq!(severity(100), None);
        assert_eq!(severity(150), Some(Severity::Warning));
        assert_eq!(severity(201), Some(Severity::Error));
        let hint = locks(&at(), &small, 1_000).unwrap().hint.unwrap();
        assert!(hint.contains("to 101"), "{hint}");
    }

    #[test]
    fn libraries_are_compared_by_name() {
        let with = |list: &str| server(150_000, &[("shared_preload_libraries", list)]);
        let source = with("pg_stat_statements, \"$libdir/pg_cron\"");
        let severity = |name: &str, list: &str| {
            preloaded(&at(), name, &source, &with(list)).map(|found| found.severity)
        };
        assert_eq!(severity("pg_cron", "auto_explain"), Some(Severity::Error));
        assert_eq!(severity("pg_cron", "pg_cron"), None);
        assert_eq!(severity("pg_stat_statements", ""), Some(Severity::Warning));
        assert_eq!(severity("hstore", ""), None);
        let unknown = preloaded(&at(), "pg_cron", &source, &server(150_000, &[]));
        assert_eq!(unknown.unwrap().severity, Severity::Note);
    }

    #[test]
    fn an_extension_of_one_database_must_be_in_that_one() {
        let found = |name, database, settings: &[(&str, &str)]| {
            in_one_database(&at(), name, database, &server(150_000, settings))
        };
        let set = [("cron.database_name", "app")];
        assert_eq!(found("pg_cron", "app", &set), None);
        assert_eq!(found("pg_cron", "postgres", &[]), None);
        assert_eq!(found("hstore", "app", &[]), None);
        let missing = found("pg_cron", "app", &[]).unwrap();
        assert_eq!(missing.severity, Severity::Error);
        assert!(missing.hint.unwrap().contains("cron.database_name = 'app'"));
        assert!(found("pg_cron", "other", &set).is_some());
    }

    #[test]
    fn pgoutput_must_be_allowed_where_that_is_a_setting() {
        let with = |list: &str| server(170_011, &[("output_plugin_libraries", list)]);
        let severity = |list: &str| output_plugin(&at(), &with(list)).unwrap().severity;
        assert_eq!(severity("pgoutput, test_decoding"), Severity::Ok);
        assert_eq!(severity("$libdir/pgoutput"), Severity::Ok);
        assert_eq!(severity("wal2json"), Severity::Error);
        assert!(output_plugin(&at(), &server(170_000, &[])).is_none());
    }

    #[test]
    fn what_a_newer_version_brought_is_named_with_an_object_that_has_it() {
        let features = [
            Feature {
                since: 18,
                what: "a virtual generated column".to_owned(),
                example: "public.t.v".to_owned(),
            },
            Feature {
                since: 15,
                what: "NULLS NOT DISTINCT".to_owned(),
                example: "public.i".to_owned(),
            },
        ];
        let found = |version| newer_features(&at(), &features, &server(version, &[])).len();
        assert_eq!((found(140_000), found(160_000), found(180_000)), (2, 1, 0));
    }

    #[test]
    fn dumps_of_newer_minors_and_sources_without_an_encoding_are_told() {
        assert!(tools(&at(), (15, 20), &server(150_019, &[])).is_some());
        assert!(tools(&at(), (15, 20), &server(150_020, &[])).is_none());
        assert!(tools(&at(), (17, 2), &server(150_000, &[])).is_none());
        assert!(encoding(&at(), "SQL_ASCII").is_some() && encoding(&at(), "UTF8").is_none());
    }
}
