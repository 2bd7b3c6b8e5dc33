//! ● Which roles a dump needs: those that the SQL it becomes names.
//!
//! The catalog of the source only tells who owns or may use anything at all: the agent's own role owns the publication, and
//! the role that owns the system is in no dependency, but nothing of either need be in the dump.
//!
//! # What it does not do
//! It does not tell SQL from text that looks like it, in the body of a function for instance. So a name that is found counts
//! only if the catalog has it as well ([`LackingRoles`]).

use std::collections::BTreeSet;

use crate::pg::quote::identifier;

/// What stands before an owner in the SQL that `pg_dump` writes.
const BEFORE_OWNER: [&str; 3] = [" OWNER TO ", " AUTHORIZATION ", " FOR ROLE "];

/// What stands before a role that is no owner: grants, policies and user mappings.
const BEFORE_OTHERS: [&str; 3] = [" TO ", " FROM ", " MAPPING FOR "];

/// Roles that the source has and the server that is written has not, or not for us.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LackingRoles {
    /// They do not exist.
    pub(crate) absent: BTreeSet<String>,
    /// Our role is no member of them: nothing can be given to them to own.
    pub(crate) foreign: BTreeSet<String>,
    /// Our role is no superuser.
    pub(crate) restricted: bool,
}

impl LackingRoles {
    /// Whether none is lacking.
    pub(crate) fn is_empty(&self) -> bool {
        self.absent.is_empty() && self.foreign.is_empty()
    }

    /// Those of them that this SQL needs.
    pub(crate) fn needed_by(&self, sql: &str) -> Self {
        let owners = named(sql, &BEFORE_OWNER);
        let others = named(sql, &BEFORE_OTHERS);
        let is_named = |role: &&String| owners.contains(*role) || others.contains(*role);
        Self {
            absent: self.absent.iter().filter(is_named).cloned().collect(),
            foreign: self.foreign.intersection(&owners).cloned().collect(),
            restricted: self.restricted,
        }
    }

    /// What is wrong, in words.
    pub(crate) fn problem(&self) -> String {
        let named = |roles: &BTreeSet<String>| roles.iter().cloned().collect::<Vec<_>>().join(", ");
        let mut problems = Vec::new();
        if !self.absent.is_empty() {
            problems.push(format!("there is no role {}", named(&self.absent)));
        }
        if !self.foreign.is_empty() {
            problems.push(format!("our role is no member of {}", named(&self.foreign)));
        }
        problems.join("; ")
    }
}

/// Every name that stands, alone or in a list, behind one of these words.
fn named(sql: &str, words: &[&str]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for word in words {
        for (at, _) in sql.match_indices(word) {
            let mut rest = &sql[at + word.len()..];
            while let Some((name, behind)) = identifier(rest) {
                names.insert(name);
                match behind.strip_prefix(", ") {
                    Some(next) => rest = next,
                    None => break,
                }
            }
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    const DUMP: &str = "
        -- Name: t; Type: TABLE; Schema: public; Owner: boss
        CREATE TABLE public.t (id integer, postgres text);
        ALTER TABLE public.t OWNER TO \"App Owner\";
        GRANT SELECT ON TABLE public.t TO reader WITH GRANT OPTION;
        REVOKE ALL ON TABLE public.t FROM cleaner;
        SET SESSION AUTHORIZATION reader;
        ALTER DEFAULT PRIVILEGES FOR ROLE maker IN SCHEMA public GRANT SELECT ON TABLES  TO guest;
        CREATE POLICY p ON public.t FOR SELECT TO watcher, \"B\" USING ((id > 0));
        CREATE USER MAPPING FOR mapped SERVER s;";

    fn lacking(absent: &[&str], foreign: &[&str]) -> LackingRoles {
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        LackingRoles {
            absent: names(absent),
            foreign: names(foreign),
            restricted: false,
        }
    }

    #[test]
    fn a_role_counts_where_the_sql_needs_it() {
        let all = [
            "App Owner",
            "B",
            "boss",
            "cleaner",
            "guest",
            "maker",
            "mapped",
            "postgres",
            "reader",
            "watcher",
        ];
        let needed = lacking(&all, &all).needed_by(DUMP);
        assert_eq!(
            needed,
            lacking(
                &[
                    "App Owner",
                    "B",
                    "cleaner",
                    "guest",
                    "maker",
                    "mapped",
                    "reader",
                    "watcher"
                ],
                &["App Owner", "maker", "reader"],
            )
        );
        assert!(
            lacking(&["boss", "postgres"], &["guest"])
                .needed_by(DUMP)
                .is_empty()
        );
    }
}
