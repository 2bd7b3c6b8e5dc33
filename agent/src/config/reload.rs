//! What a running process takes over of a configuration file that was changed: what SIGHUP reads.
//!
//! Pure. Every key is in one table: either every session can begin anew with it, or something that lives as long as the process
//! depends on it, and it needs a restart.
//!
//! # Invariants
//! - What needs a restart stays as it was, so that no part of the process goes by another value than the rest.
//! - Every key is judged: a unit test takes the configuration apart without leaving out a field.
//!
//! # What it does not do
//! What is behind a key is not compared: passwords and certificates are read anew by every session.

use super::Config;

/// What becomes of a changed file.
#[derive(Debug)]
pub struct Reload {
    /// In use from now on.
    pub config: Config,
    /// Keys that were changed and taken over.
    pub taken: Vec<&'static str>,
    /// Keys that were changed and need a restart.
    pub restart: Vec<&'static str>,
}

/// One key, or several that are one thing.
struct ReloadKey {
    name: &'static str,
    is_same: fn(&Config, &Config) -> bool,
    /// None where it needs a restart.
    take: Option<fn(&mut Config, &Config)>,
}

/// A key that is taken over.
macro_rules! taken {
    ($name:literal, $($field:ident).+) => {
        ReloadKey {
            name: $name,
            is_same: |old, new| old.$($field).+ == new.$($field).+,
            take: Some(|to, from| to.$($field).+.clone_from(&from.$($field).+)),
        }
    };
}

/// A key that needs a restart.
macro_rules! restart {
    ($name:literal, $($field:ident).+) => {
        ReloadKey {
            name: $name,
            is_same: |old, new| old.$($field).+ == new.$($field).+,
            take: None,
        }
    };
}

const KEYS: &[ReloadKey] = &[
    ReloadKey {
        name: "source.url or source.password_file",
        is_same: |old, new| old.source.conninfo.is_same_place(&new.source.conninfo),
        take: None,
    },
    restart!("source.databases", source.databases),
    restart!("source.slot", source.slot),
    taken!("source.keyless", source.keyless),
    taken!("source.ddl", source.ddl),
    taken!("source.exclude", source.exclude),
    taken!("source.heartbeat", source.heartbeat_every),
    taken!("source.sequences", source.sequences_every),
    ReloadKey {
        name: "replica.url or replica.password_file",
        is_same: |old, new| old.replica.conninfo.is_same_place(&new.replica.conninfo),
        take: None,
    },
    ReloadKey {
        name: "replica.bandwidth",
        is_same: |old, new| {
            let of = |config: &Config| config.replica.conninfo.bytes_per_second();
            of(old) == of(new)
        },
        take: Some(|to, from| {
            let of_the_same_place = to.replica.conninfo.clone();
            to.replica.conninfo = of_the_same_place.bound_like(&from.replica.conninfo);
        }),
    },
    taken!("replica.lanes", replica.lanes),
    taken!("replica.set_aside", replica.set_aside),
    taken!("objectives.rpo", objectives.rpo),
    taken!("objectives.rto", objectives.rto),
    taken!("limits.batch_bytes", limits.batch_bytes),
    taken!("limits.batch_changes", limits.batch_changes),
    taken!("limits.spread_changes", limits.spread_changes),
    taken!("limits.index_bytes", limits.index_bytes),
    taken!("limits.queue_bytes", limits.queue_bytes),
    taken!("limits.transaction_bytes", limits.transaction_bytes),
    taken!("limits.catch_up_bytes", limits.catch_up_bytes),
    taken!("limits.spill_bytes", limits.spill_bytes),
    restart!("limits.spill_directory", limits.spill_directory),
    taken!("limits.retry_max", limits.retry_max),
    taken!("limits.shutdown_grace", limits.shutdown_grace),
    taken!("copy.jobs", copy.jobs),
    taken!("copy.pg_bin", copy.pg_bin),
    taken!("copy.split_bytes", copy.split_bytes),
    restart!("route", route),
    restart!("archive", archive),
    restart!("http.listen", http_listen),
    // `promote` reads the file itself.
    taken!("promote.hook", hooks),
];

/// What a process that goes by `old` takes over of `new`.
pub fn reload(old: &Config, new: &Config) -> Reload {
    let (mut taken, mut restart) = (Vec::new(), Vec::new());
    let mut config = old.clone();
    for key in KEYS.iter().filter(|key| !(key.is_same)(old, new)) {
        match key.take {
            Some(take) => {
                take(&mut config, new);
                taken.push(key.name);
            }
            None => restart.push(key.name),
        }
    }
    Reload {
        config,
        taken,
        restart,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Archive, CopySettings, Limits, Objectives, Replica, Source};
    use super::*;

    const LEAST: &str = "[source]\nurl = \"postgres://a@localhost/x\"\n[replica]\nurl = \"postgres://b@localhost/y\"\n";

    fn parse(text: &str) -> Config {
        Config::parse("test", text, []).unwrap()
    }

    /// Does not compile while a key is not thought of; then it belongs into the table, and here.
    #[test]
    fn every_key_is_judged() {
        let Config {
            source:
                Source {
                    conninfo: _,
                    databases: _,
                    slot: _,
                    keyless: _,
                    ddl: _,
                    exclude: _,
                    heartbeat_every: _,
                    sequences_every: _,
                },
            replica:
                Replica {
                    conninfo: _,
                    lanes: _,
                    set_aside: _,
                },
            objectives: Objectives { rpo: _, rto: _ },
            limits:
                Limits {
                    batch_bytes: _,
                    batch_changes: _,
                    spread_changes: _,
                    index_bytes: _,
                    queue_bytes: _,
                    transaction_bytes: _,
                    catch_up_bytes: _,
                    spill_bytes: _,
                    spill_directory: _,
                    retry_max: _,
                    shutdown_grace: _,
                },
            copy:
                CopySettings {
                    jobs: _,
                    pg_bin: _,
                    split_bytes: _,
                },
            route: _,
            archive: _,
            http_listen: _,
            hooks: _,
        } = parse(LEAST);
    }

    #[test]
    fn nothing_changed_takes_nothing_over() {
        let same = reload(&parse(LEAST), &parse(LEAST));
        assert!(same.taken.is_empty() && same.restart.is_empty());
    }

    #[test]
    fn each_changed_key_is_taken_over_or_named() {
        // Key, value, whether it is taken over.
        let cases = [
            ("source.databases", "[\"a\"]", false),
            ("source.slot", "\"other\"", false),
            ("source.keyless", "\"full\"", true),
            ("source.ddl", "\"off\"", true),
            ("source.exclude", "[\"public.x\"]", true),
            ("source.heartbeat", "\"7s\"", true),
            ("source.sequences", "\"7s\"", true),
            ("replica.bandwidth", "\"1MiB\"", true),
            ("replica.lanes", "7", true),
            ("replica.set_aside", "\"never\"", true),
            ("objectives.rpo", "\"7s\"", true),
            ("objectives.rto", "\"7s\"", true),
            ("limits.batch_bytes", "\"7MiB\"", true),
            ("limits.batch_changes", "7", true),
            ("limits.spread_changes", "7", true),
            ("limits.index_bytes", "\"7MiB\"", true),
            ("limits.queue_bytes", "\"7MiB\"", true),
            ("limits.transaction_bytes", "\"7MiB\"", true),
            ("limits.catch_up_bytes", "\"7MiB\"", true),
            ("limits.spill_bytes", "\"7MiB\"", true),
            ("limits.spill_directory", "\"/elsewhere\"", false),
            ("limits.retry_max", "\"7s\"", true),
            ("limits.shutdown_grace", "\"7s\"", true),
            ("copy.jobs", "7", true),
            ("copy.pg_bin", "\"/elsewhere\"", true),
            ("copy.split_bytes", "\"7MiB\"", true),
            ("http.listen", "\"127.0.0.1:7\"", false),
            ("source.url", "\"postgres://a@elsewhere/x\"", false),
            ("source.password_file", "\"/elsewhere\"", false),
            ("replica.url", "\"postgres://b:secret@localhost/y\"", false),
            ("replica.password_file", "\"/elsewhere\"", false),
        ];
        let old = parse(LEAST);
        for (key, value, taken_over) in cases {
            let name = format!("DR_AGENT__{}", key.to_uppercase().replace('.', "__"));
            let value = value.to_owned();
            let new = Config::parse("test", LEAST, [(name, value)]).unwrap();
            let found = reload(&old, &new);
            let (in_list, other) = match taken_over {
                true => (&found.taken, &found.restart),
                false => (&found.restart, &found.taken),
            };
            assert!(other.is_empty(), "{key}: {found:?}");
            assert!(
                matches!(in_list.as_slice(), [named] if named.contains(key)),
                "{key}: {found:?}"
            );
            // Read again, the same file changes nothing more, or names the same.
            let again = reload(&found.config, &new);
            assert!(again.taken.is_empty(), "{key}");
            assert_eq!(again.restart, found.restart, "{key}");
        }
    }

    #[test]
    fn sections_that_need_a_restart_stay_as_they_were() {
        let archive = format!("{LEAST}[archive]\nurl = \"file:///somewhere\"\n");
        let named = LEAST.replace("[replica]", "databases = [\"app\"]\n[replica]");
        let route = format!("{named}[route]\nkind = \"kinesis\"\nstream = \"app\"\n");
        let hook = format!("{LEAST}[[promote.hook]]\nname = \"a\"\ncommand = [\"b\"]\n");
        let (old, lanes) = (parse(LEAST), "[limits]\nbatch_changes = 7\n");
        let found = reload(&old, &parse(&format!("{archive}{lanes}")));
        assert_eq!(found.restart, ["archive"]);
        assert_eq!(found.taken, ["limits.batch_changes"]);
        assert!(found.config.archive.is_none());
        assert_eq!(found.config.limits.batch_changes, 7);
        let retention = format!("{archive}retention = \"400h\"\n");
        let found = reload(&parse(&archive), &parse(&retention));
        assert_eq!(found.restart, ["archive"]);
        let kept: Option<Archive> = parse(&archive).archive;
        assert_eq!(found.config.archive, kept);
        let found = reload(&parse(&named), &parse(&route));
        assert_eq!(found.restart, ["route"]);
        assert_eq!(reload(&old, &parse(&hook)).taken, ["promote.hook"]);
    }
}
