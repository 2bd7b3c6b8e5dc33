//! ● What to do about an error whose SQLSTATE has several causes.
//!
//! Pure. A server says it in its own language (`lc_messages`), and names the function of its source that raised it in none: that
//! tells most causes apart. Within one function the message does, where it is English or has a name of PostgreSQL's in it, which
//! are not translated (`pg_hba.conf`, `max_wal_senders`). Looked at on 14 to 18, and in German and Korean.
//!
//! # What it does not do
//! It decides nothing: whether to go on is the SQLSTATE's alone.

use super::ServerError;

/// A SQLSTATE, where it is raised (a function, or a file; empty: anywhere), what the message has (empty: whatever), and what to do.
/// The first that fits.
const CAUSES: &[(&str, &str, &str, &str)] = &[
    (
        "28000",
        "",
        "pg_hba.conf",
        "pg_hba.conf of that server has no line that lets this role into this database from here; a logical replication \
         connection goes by the line of its database. After a change: SELECT pg_reload_conf()",
    ),
    (
        "28000",
        "ClientAuthentication",
        "",
        "pg_hba.conf demands a client certificate: sslcert and sslkey in the URL",
    ),
    (
        "28000",
        "",
        "client certificate",
        "pg_hba.conf demands a client certificate: sslcert and sslkey in the URL",
    ),
    (
        "28000",
        "auth_failed",
        "",
        "the client certificate (sslcert) is not that of this role: see pg_ident.conf and clientname in pg_hba.conf",
    ),
    (
        "28000",
        "",
        "certificate authentication",
        "the client certificate (sslcert) is not that of this role: see pg_ident.conf and clientname in pg_hba.conf",
    ),
    (
        "28000",
        "",
        "not permitted to log in",
        "the role needs the attribute LOGIN: ALTER ROLE … LOGIN",
    ),
    (
        "28000",
        "",
        "set role",
        "a stored setting `role` (ALTER ROLE or ALTER DATABASE … SET role) names a role that ours may not become: RESET it",
    ),
    (
        "28000",
        "",
        "does not exist",
        "there is no such role on that server: correct the URL, or create it (`dr-agent init` does)",
    ),
    (
        "28000",
        "InitializeSessionUserId",
        "",
        "there is no such role on that server (correct the URL, or create it: `dr-agent init` does), or it lacks the attribute \
         LOGIN (ALTER ROLE … LOGIN)",
    ),
    (
        "28000",
        "",
        "",
        "pg_hba.conf or the role's attributes do not let us in; the message above says which",
    ),
    (
        "53300",
        "InitializeSessionUserId",
        "",
        "raise the role's own limit on that server: ALTER ROLE … CONNECTION LIMIT; it is tried again",
    ),
    (
        "53300",
        "CheckMyDatabase",
        "",
        "raise the database's own limit on that server: ALTER DATABASE … CONNECTION LIMIT; it is tried again",
    ),
    (
        "53300",
        "",
        "max_wal_senders",
        "raise max_wal_senders on that server, and restart it; it is tried again",
    ),
    (
        "53300",
        "",
        "",
        "all sessions of that server are taken: end some, or raise max_connections there and restart it; it is tried again",
    ),
    (
        "53400",
        "ReplicationSlotCreate",
        "",
        "raise max_replication_slots on that server, and restart it; it is tried again",
    ),
    (
        "53400",
        "",
        "",
        "a limit of that server's configuration is reached, which the message above names; it is tried again",
    ),
    ("53200", "lock.c", "", MORE_LOCKS),
    ("53200", "predicate.c", "", MORE_LOCKS),
    ("53200", "", "shared memory", MORE_LOCKS),
    (
        "55000",
        "CheckMyDatabase",
        "",
        "that database accepts no connections (ALTER DATABASE … ALLOW_CONNECTIONS true); it is tried again",
    ),
];

const MORE_LOCKS: &str =
    "raise max_locks_per_transaction on that server, and restart it; it is tried again";

/// What to do about it, if that is known.
pub(super) fn of(error: &ServerError) -> Option<&'static str> {
    let (file, routine) = &error.raised;
    let fits = |(sqlstate, raised, words, _): &&(&str, &str, &str, &str)| {
        error.sqlstate == *sqlstate
            && (raised.is_empty() || raised == file || raised == routine)
            && error.message.contains(words)
    };
    CAUSES.iter().find(fits).map(|(.., hint)| *hint)
}

/// Whether a server's lock table is full.
pub(super) fn is_of_locks(error: &ServerError) -> bool {
    error.sqlstate == "53200" && of(error) == Some(MORE_LOCKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As servers sent them: SQLSTATE, file, function, the message in some language, and a word of the hint.
    const RECORDED: &[(&str, &str, &str, &str, &str)] = &[
        (
            "28000",
            "auth.c",
            "ClientAuthentication",
            "no pg_hba.conf entry for host \"[local]\", user \"dr\"",
            "pg_reload_conf",
        ),
        (
            "28000",
            "auth.c",
            "ClientAuthentication",
            "pg_hba.conf rejects connection for host \"[local]\"",
            "pg_reload_conf",
        ),
        (
            "28000",
            "auth.c",
            "ClientAuthentication",
            "kein pg_hba.conf-Eintrag für Host »[local]«, Benutzer »dr«",
            "pg_reload_conf",
        ),
        (
            "28000",
            "auth.c",
            "ClientAuthentication",
            "암호화 안함 연결이 pg_hba.conf 파일 설정에 따라 거부됨",
            "pg_reload_conf",
        ),
        (
            "28000",
            "auth.c",
            "ClientAuthentication",
            "connection requires a valid client certificate",
            "sslcert",
        ),
        (
            "28000",
            "auth.c",
            "ClientAuthentication",
            "Verbindung erfordert ein gültiges Client-Zertifikat",
            "sslcert",
        ),
        (
            "28000",
            "auth.c",
            "auth_failed",
            "certificate authentication failed for user \"dr\"",
            "pg_ident.conf",
        ),
        (
            "28000",
            "auth.c",
            "auth_failed",
            "Zertifikatauthentifizierung für Benutzer »dr« fehlgeschlagen",
            "pg_ident.conf",
        ),
        (
            "28000",
            "miscinit.c",
            "InitializeSessionUserId",
            "role \"dr\" does not exist",
            "no such role",
        ),
        (
            "28000",
            "miscinit.c",
            "InitializeSessionUserId",
            "role \"dr\" is not permitted to log in",
            "needs the attribute LOGIN",
        ),
        (
            "28000",
            "miscinit.c",
            "InitializeSessionUserId",
            "Rolle »dr« existiert nicht",
            "no such role",
        ),
        (
            "28000",
            "miscinit.c",
            "InitializeSessionUserId",
            "\"dr\" 롤은 접속을 허용하지 않음",
            "lacks the attribute",
        ),
        (
            "28000",
            "",
            "",
            "permission denied to set role \"app\"",
            "RESET",
        ),
        ("28000", "", "", "irgendetwas", "the message above"),
        (
            "53300",
            "proc.c",
            "InitProcess",
            "sorry, too many clients already",
            "max_connections",
        ),
        (
            "53300",
            "proc.c",
            "InitProcess",
            "tut mir leid, schon zu viele Verbindungen",
            "max_connections",
        ),
        (
            "53300",
            "postinit.c",
            "InitPostgres",
            "remaining connection slots are reserved for roles with the SUPERUSER attribute",
            "max_connections",
        ),
        (
            "53300",
            "miscinit.c",
            "InitializeSessionUserId",
            "\"few\" 롤의 최대 동시 접속수를 초과했습니다",
            "ALTER ROLE",
        ),
        (
            "53300",
            "postinit.c",
            "CheckMyDatabase",
            "zu viele Verbindungen für Datenbank »few«",
            "ALTER DATABASE",
        ),
        (
            "53300",
            "proc.c",
            "InitProcess",
            "Anzahl angeforderter Standby-Verbindungen überschreitet max_wal_senders (aktuell 2)",
            "max_wal_senders",
        ),
        (
            "53400",
            "slot.c",
            "ReplicationSlotCreate",
            "모든 복제 슬롯이 사용 중입니다.",
            "max_replication_slots",
        ),
        (
            "53400",
            "fd.c",
            "reserveAllocatedDesc",
            "exceeded maxAllocatedDescs (32)",
            "configuration",
        ),
        (
            "53200",
            "lock.c",
            "LockAcquireExtended",
            "Shared Memory aufgebraucht",
            "max_locks_per_transaction",
        ),
        (
            "53200",
            "lock.c",
            "LockAcquireExtended",
            "공유 메모리 부족",
            "max_locks_per_transaction",
        ),
        (
            "55000",
            "postinit.c",
            "CheckMyDatabase",
            "Datenbank »closed« akzeptiert gegenwärtig keine Verbindungen",
            "ALLOW_CONNECTIONS",
        ),
    ];

    fn error(sqlstate: &str, raised: (&str, &str), message: &str) -> ServerError {
        ServerError {
            sqlstate: sqlstate.to_owned(),
            message: message.to_owned(),
            raised: (raised.0.to_owned(), raised.1.to_owned()),
            ..ServerError::default()
        }
    }

    #[test]
    fn a_cause_is_found_whatever_language_the_server_speaks() {
        for (sqlstate, file, routine, message, words) in RECORDED {
            let error = error(sqlstate, (file, routine), message);
            let hint = of(&error).unwrap_or_default();
            assert!(hint.contains(words), "{message}: {hint}");
        }
    }

    #[test]
    fn what_is_of_another_kind_has_no_such_cause() {
        assert_eq!(
            of(&error(
                "53200",
                ("mcxt.c", "MemoryContextAlloc"),
                "out of memory"
            )),
            None
        );
        assert_eq!(
            of(&error("55000", ("x.c", "f"), "not currently accepting")),
            None
        );
        assert!(is_of_locks(&error(
            "53200",
            ("lock.c", "LockAcquireExtended"),
            "x"
        )));
    }
}
