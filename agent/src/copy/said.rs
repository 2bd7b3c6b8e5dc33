//! ● What `pg_dump` and its like have said: whether it passes by itself, what to do, and what may be repeated.
//!
//! Pure. Their own words are English (they run with `LC_ALL=C`). What they pass on of a server is in its language, without an SQLSTATE
//! and without the place where it was raised: [`super::tools`] has no way to ask for either. Internal errors are never translated.
//!
//! # Invariants
//! - Nothing is a definite error because it was not understood.
//! - No DETAIL and no CONTEXT is repeated, in whatever language: they quote rows.

use crate::pg::tells_of_a_drop;

/// What a server's lines begin with in English, before a colon and two blanks. Others are another language's.
const MARKS: [&str; 15] = [
    "ERROR",
    "FATAL",
    "PANIC",
    "WARNING",
    "NOTICE",
    "DETAIL",
    "HINT",
    "CONTEXT",
    "LOG",
    "INFO",
    "DEBUG",
    "QUERY",
    "STATEMENT",
    "LOCATION",
    "LINE",
];

/// The word before a colon and two blanks, as libpq puts the severity of a message before its text.
fn mark(line: &str) -> Option<&str> {
    let (before, _) = line.split_once(":  ")?;
    before.rsplit(char::is_whitespace).next()
}

/// Whether a server's message is English, as far as that can be seen: beside names, which are in quotes, it has no character
/// that English has not, and its severity is an English word.
fn is_english(said: &str) -> bool {
    let outside_of_quotes = said.split('"').step_by(2);
    said.lines()
        .filter_map(mark)
        .all(|mark| MARKS.contains(&mark))
        // Without its characters, a server writes « and » like this.
        && outside_of_quotes
            .into_iter()
            .all(|text| text.is_ascii() && !text.contains("<<") && !text.contains(">>"))
}

/// Whether a tool failed for a reason that goes away by itself: its message is all there is. One in a language that
/// is not understood is taken for such a reason: it is tried again, and said.
pub(super) fn passes_by_itself(stderr: &str) -> bool {
    const PASSING: [&str; 14] = [
        "connection to server",
        "server closed the connection",
        "terminating connection",
        "the database system is",
        "canceling statement due to lock timeout",
        // What `--lock-wait-timeout` of pg_dump comes to.
        "canceling statement due to statement timeout",
        "could not obtain lock",
        "too many clients",
        "Too many open files",
        "read-only transaction",
        "remaining connection slots",
        "No space left on device",
        "lost connection",
        "deadlock detected",
    ];
    // These also begin with "connection to server", and do not pass. A password and pg_hba.conf may be being changed.
    const STAYING: [&str; 2] = ["no password supplied", "does not exist"];
    // A table, a function or a type that was dropped while pg_dump looked at it; the next snapshot does not show it.
    let dropped = tells_of_a_drop(stderr)
        || stderr.contains("no matching tables were found")
        || stderr.contains("relation \"") && stderr.contains("does not exist");
    dropped
        || !is_english(stderr)
        || PASSING.iter().any(|text| stderr.contains(text))
            && !STAYING.iter().any(|text| stderr.contains(text))
}

/// What to do about it.
pub(super) fn hint(stderr: &str) -> Option<String> {
    let hint = if stderr.contains("role \"") && stderr.contains("does not exist") {
        "create the source's roles on the replica: pg_dumpall --roles-only | psql"
    } else if stderr.contains("permission denied") || stderr.contains("must be owner") {
        "the role lacks a right; `dr-agent check` lists every one it needs"
    } else if stderr.contains("No space left on device") {
        // The server speaks of its own files as ERROR.
        match stderr.contains("ERROR:") {
            true => "the server's disk is full; free space, the copy goes on by itself",
            false => {
                "the directory for temporary files (TMPDIR) of this machine is full; free space, the copy goes on by itself"
            }
        }
    } else if stderr.contains("already exists") {
        "an index, a constraint or another object of the replica has that name, perhaps of a table that was renamed there: give \
         it another name, or rename the table back"
    } else if stderr.contains("violates foreign key") {
        "the source itself holds rows that break this constraint; repair them there"
    } else if stderr.contains("could not create unique") {
        "the source itself holds rows that are equal by this index (SELECT … GROUP BY … HAVING count(*) > 1), or they are equal \
         only here, where text is ordered by another locale or version of it: compare both, and repair what is wrong"
    } else if !is_english(stderr) {
        "the server speaks a language in which its messages are not recognized, so it is tried again; in English they are: \
         ALTER ROLE … SET lc_messages = 'C' for the agent's role, as a superuser of that server"
    } else {
        return None;
    };
    Some(hint.to_owned())
}

/// Whether the snapshot that the tool was told to use is not there any more. The tool tells which statement failed.
pub(super) fn is_lost_snapshot(stderr: &str) -> bool {
    stderr.contains("uery was: SET TRANSACTION SNAPSHOT")
        || stderr.contains("invalid snapshot identifier")
        || stderr.contains("could not import the requested snapshot")
        || (stderr.contains("snapshot \"") && stderr.contains("does not exist"))
}

/// The lines that say what went wrong. DETAIL and CONTEXT quote rows, the failed command is long.
pub(super) fn essence(stderr: &str) -> String {
    const CHARACTERS_MAX: usize = 1000;
    let lines: Vec<&str> = stderr
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.contains("DETAIL:") && !line.contains("CONTEXT:"))
        .collect();
    let mut telling: Vec<&str> = lines
        .iter()
        .copied()
        .filter(|line| {
            ["error:", "ERROR:", "FATAL:", "HINT:"]
                .iter()
                .any(|t| line.contains(t))
        })
        .collect();
    if telling.is_empty() {
        let is_known = |line: &&str| mark(line).is_none_or(|mark| MARKS.contains(&mark));
        telling = lines[lines.len().saturating_sub(5)..].to_vec();
        telling.retain(is_known);
    }
    telling.join("; ").chars().take(CHARACTERS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As tools of 15 said them of a server in that language, and whether it passes by itself.
    const SAID: &[(&str, bool)] = &[
        (
            "pg_dump: error: query failed: ERROR:  permission denied for table t",
            false,
        ),
        (
            "pg_dump: error: query failed: FEHLER:  keine Berechtigung für Tabelle t",
            true,
        ),
        (
            "pg_dump: error: query failed: FEHLER:  storniere Anfrage wegen Zeitlimit",
            true,
        ),
        (
            "pg_dump: error: query failed: 오류:  작업시간 초과로 작업을 취소합니다.",
            true,
        ),
        (
            "pg_dump: error: query failed: ERROR:  permiso denegado a la tabla «t»",
            true,
        ),
        (
            "pg_dump: error: query failed: ERROR:  permiso denegado a la tabla <<t>>",
            true,
        ),
        ("pg_dump: error: query failed: FEL:  avbryter sats", true),
        (
            "pg_dump: error: query failed: ERROR:  type \"größe\" is only a shell",
            false,
        ),
        (
            "pg_dump: error: aborting because of server version mismatch",
            false,
        ),
    ];

    #[test]
    fn what_is_not_understood_is_tried_again() {
        for (said, passes) in SAID {
            assert_eq!(passes_by_itself(said), *passes, "{said}");
            let told = hint(said).is_some_and(|hint| hint.contains("lc_messages"));
            assert_eq!(told, *passes, "{said}");
        }
    }

    #[test]
    fn a_lost_snapshot_is_known_by_the_statement_that_failed() {
        for said in [
            "pg_dump: error: query failed: FEHLER:  ungültiger Snapshot-Bezeichner: »x«\n\
             pg_dump: detail: Query was: SET TRANSACTION SNAPSHOT 'x'",
            "pg_dump: error: query was: SET TRANSACTION SNAPSHOT 'x'",
            "ERROR:  invalid snapshot identifier: \"x\"",
        ] {
            assert!(is_lost_snapshot(said), "{said}");
        }
        assert!(!is_lost_snapshot(
            "pg_dump: detail: Query was: LOCK TABLE t"
        ));
    }

    #[test]
    fn no_row_is_repeated_in_any_language() {
        for said in [
            "FEHLER:  doppelter Schlüsselwert\nDETAIL:  Schlüssel »(a)=(secret)« existiert bereits.",
            "오류:  중복된 키\n상세정보:  (a)=(secret) 키가 이미 있습니다.",
            "ERREUR:  x\nDÉTAIL:  secret\nCONTEXTE:  COPY t, ligne 1 : secret",
            "ERROR:  x\nDETALLE:  La llave (a)=(secret) ya existe.",
        ] {
            assert!(!essence(said).contains("secret"), "{said}");
        }
        assert_eq!(
            essence("pg_dump: error while loading shared libraries: libpq.so.5"),
            "pg_dump: error while loading shared libraries: libpq.so.5"
        );
    }

    #[test]
    fn what_a_tool_says_is_kept_without_rows() {
        let said = "pg_restore: error: could not execute query: ERROR:  could not create unique index \"u\"\n\
                    DETAIL:  Key (email)=(secret@example.org) is duplicated.\n\
                    Command was: CREATE UNIQUE INDEX u ON t (email);\n";
        let kept = essence(said);
        assert!(
            kept.contains("unique index \"u\"") && !kept.contains("secret"),
            "{kept}"
        );
        assert!(is_lost_snapshot(
            "ERROR:  invalid snapshot identifier: \"x\""
        ));
    }
}
