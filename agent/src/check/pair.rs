//! ● Source and replica compared: the two servers, then each database on both.
//!
//! Pure: what `source` and `replica` learned comes in, findings go out.

use std::collections::{BTreeMap, BTreeSet};

use super::compare;
use super::finding::{Finding, FindingPlace, FindingSide, Severity, counted, some_of};
use super::replica::{ReplicaDatabase, ReplicaFacts};
use super::server::LocaleFacts;
use super::settings;
use super::shape::Shapes;
use super::slot::{self, Kept};
use super::source::{SourceDatabase, SourceFacts};
use super::startable;
use crate::config::{Config, Route};
use crate::error::remedy;
use crate::names::TableName;

/// Compares the servers.
pub(super) fn servers(
    config: &Config,
    source: &SourceFacts,
    replica: &ReplicaFacts,
) -> Vec<Finding> {
    let at = FindingPlace::server(FindingSide::Both);
    let mut findings: Vec<Finding> = settings::same_server(&at, &source.server, &replica.server)
        .into_iter()
        .collect();
    let there = FindingPlace::server(FindingSide::Replica);
    findings.extend(settings::replica_settings(
        &there,
        &replica.server,
        &source.server,
        config.replica.lanes,
    ));
    findings.extend(roles(&there, &source.roles, &replica.roles));
    findings
}

fn roles(at: &FindingPlace, source: &[String], replica: &[String]) -> Option<Finding> {
    let missing: Vec<&String> = source
        .iter()
        .filter(|role| !replica.contains(role))
        .collect();
    if missing.is_empty() {
        return Some(at.ok("roles", "every role of the source is there"));
    }
    let finding = at.warning(
        "role_missing",
        format!(
            "{} of the source missing: {}",
            counted(missing.len(), "role"),
            some_of(&missing)
        ),
    );
    Some(finding.hint(
        "roles are not replicated; after a promotion these cannot log in. dr-agent init and run create \
         those that own something or were granted something, where their role has CREATEROLE; the \
         others: pg_dumpall --roles-only",
    ))
}

/// Compares one database. `there` is `None` while the replica's has yet to be created.
pub(super) fn database(
    config: &Config,
    name: &str,
    (source, here): (&SourceFacts, &SourceDatabase),
    (replica, there): (&ReplicaFacts, Option<&ReplicaDatabase>),
) -> Vec<Finding> {
    let at = FindingPlace::database(FindingSide::Both, name);
    let stream = config.stream(name);
    let nothing = Kept::default();
    let kept = there.map_or(&nothing, |there| &there.kept);
    // It is a primary of its own now, which has been said: what differs from the source is no fault of it.
    if kept.promotion.is_some() {
        return Vec::new();
    }
    let slot = source
        .slots
        .iter()
        .find(|slot| slot.name == stream.as_str());
    let mut findings = Vec::new();
    if config.route == Route::Direct {
        findings.extend(slot::judge(&at, stream.as_str(), name, slot, kept));
        let begun = kept.progress.is_some();
        findings.extend(publication(&at, stream.as_str(), here, begun));
    } else {
        let noted = here.noted.is_some();
        findings.extend(slot::apart(&at, stream.as_str(), slot, noted, kept));
    }
    let applier = config.route.applier();
    findings.extend(slot::origin(
        &at,
        kept,
        &source.server,
        here.wal_end,
        slot.is_some_and(|slot| slot.synced),
        applier,
    ));
    let installed = there.map_or(&[][..], |there| &there.extensions);
    findings.extend(extensions(
        &at,
        &here.extensions,
        &replica.available,
        installed,
    ));
    let uninstalled = here.extensions.iter().map(|(name, _)| name.as_str());
    let uninstalled = uninstalled.filter(|name| !installed.iter().any(|(there, _)| there == name));
    for extension in uninstalled {
        let preloaded = startable::preloaded(&at, extension, &source.server, &replica.server);
        findings.extend(preloaded);
        let in_it = startable::in_one_database(&at, extension, name, &replica.server);
        findings.extend(in_it);
    }
    if kept.progress.is_none() {
        let there = FindingPlace::database(FindingSide::Replica, name);
        findings.extend(startable::newer_features(
            &there,
            &here.features,
            &replica.server,
        ));
        findings.extend(startable::locks(&there, &replica.server, here.relations.1));
    }
    let locale = |databases: &[super::server::DatabaseFacts]| {
        databases
            .iter()
            .find(|one| one.name == name)
            .map(|one| one.locale.clone())
    };
    if let (Some(one), Some(other)) = (locale(&source.databases), locale(&replica.databases)) {
        findings.extend(locales(&at, &one, &other));
    }
    findings.extend(firing(&at, here, there));
    if let Some(there) = there {
        findings.extend(tables(&at, here, there, applier));
    }
    findings
}

/// A publication that is not there: right before the first start, a gap once it has `begun`.
pub(super) fn publication(
    at: &FindingPlace,
    name: &str,
    here: &SourceDatabase,
    begun: bool,
) -> Option<Finding> {
    if here.has_publication {
        return None;
    }
    if !begun {
        let text = format!(
            "is not there yet; dr-agent run creates it with {}",
            counted(here.wanted.published.len(), "table")
        );
        return Some(at.ok("publication", text).on(name));
    }
    let finding = at.error(
        "publication_missing",
        "was dropped, and changes since then are missing on the replica for good",
    );
    Some(
        finding
            .on(name)
            .hint(remedy::start_over(&remedy::drop_slot(name))),
    )
}

fn extensions(
    at: &FindingPlace,
    source: &[(String, String)],
    available: &BTreeMap<String, String>,
    installed: &[(String, String)],
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, version) in source {
        let there = installed.iter().find(|(other, _)| other == name);
        if there.is_none() && !available.contains_key(name) {
            findings.push(
                at.error(
                    "extension_missing",
                    "is installed on the source and not available on the replica",
                )
                .on(name)
                .hint("install its package on the replica's machine, or drop it on the source"),
            );
        } else if let Some((_, other)) = there
            && other != version
        {
            findings.push(
                at.note(
                    "extension_version",
                    format!("{version} on the source, {other} on the replica"),
                )
                .on(name),
            );
        }
    }
    findings
}

fn locales(at: &FindingPlace, source: &LocaleFacts, replica: &LocaleFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    if source.encoding != replica.encoding {
        findings.push(
            at.warning(
                "encoding",
                format!(
                    "{} on the source, {} on the replica: a character that one lacks stops replication",
                    source.encoding, replica.encoding
                ),
            )
            .hint("create the replica's database with the source's encoding"),
        );
    }
    let order = |locale: &LocaleFacts| {
        let LocaleFacts {
            collate,
            ctype,
            provider,
            provider_locale,
            ..
        } = locale;
        match provider.as_str() {
            "c" if collate == ctype => collate.clone(),
            "c" => format!("{collate} (LC_CTYPE {ctype})"),
            "i" => format!("ICU {provider_locale}"),
            _ => format!("builtin {provider_locale}"),
        }
    };
    let (here, there) = (order(source), order(replica));
    if here != there {
        findings.push(
            at.warning(
                "locale",
                format!("{here} on the source, {there} on the replica: text sorts and folds differently after a promotion"),
            )
            .hint("create the replica's database with the source's locale where the system has it"),
        );
    } else if !source.version.is_empty()
        && !replica.version.is_empty()
        && source.version != replica.version
    {
        findings.push(at.note(
            "collation_version",
            format!(
                "{here} is version {} on the source, {} on the replica: some text may sort differently",
                source.version, replica.version
            ),
        ));
    }
    findings
}

/// Triggers of the source that will fire on the replica once its schema is copied; those already
/// there are reported with the replica.
fn firing(
    at: &FindingPlace,
    here: &SourceDatabase,
    there: Option<&ReplicaDatabase>,
) -> Vec<Finding> {
    here.shapes
        .iter()
        .filter(|(name, shape)| !shape.of_extension && name.schema != "dr_agent")
        .filter(|(name, _)| !there.is_some_and(|there| there.shapes.contains_key(name)))
        .filter(|(_, shape)| !shape.firing.is_empty())
        .map(|(name, shape)| {
            at.warning(
                "trigger_fires",
                format!(
                    "{} is enabled ALWAYS or REPLICA and will fire during apply",
                    some_of(&shape.firing)
                ),
            )
            .on(name)
            .hint("after the copy: ALTER TABLE … ENABLE TRIGGER … on the replica, unless it is meant to act there as well")
        })
        .collect()
}

/// Every table that is or will be published, against the table of its name on the replica.
fn tables(
    at: &FindingPlace,
    here: &SourceDatabase,
    there: &ReplicaDatabase,
    applier: &str,
) -> Vec<Finding> {
    let kept = &there.kept;
    let mut findings = Vec::new();
    let mut same = 0;
    for table in &here.wanted.published {
        let name = &table.name;
        let Some(source) = here.shapes.get(name) else {
            continue;
        };
        match there.shapes.get(name) {
            // Keys and indexes come after the rows: a table that is being copied has none yet.
            Some(_) if kept.copying.contains(name) => {}
            Some(replica) => {
                let found = compare::table(at, name, source, replica);
                same += usize::from(found.is_empty());
                findings.extend(found);
            }
            None => findings.extend(missing(at, name, kept)),
        }
    }
    findings.extend(copy_state(at, kept, applier));
    if kept.progress.is_none() {
        findings.extend(strangers(at, &there.shapes, applier));
    }
    if findings.iter().all(|f| f.severity > Severity::Warning) && same > 0 {
        findings.push(at.ok(
            "tables",
            format!("{} alike on both sides", counted(same, "table")),
        ));
    }
    findings
}

/// The first copy goes into an empty database.
fn strangers(at: &FindingPlace, shapes: &Shapes, applier: &str) -> Option<Finding> {
    let strangers: Vec<&TableName> = shapes
        .iter()
        .filter(|(name, shape)| name.schema != "dr_agent" && !shape.of_extension)
        .filter(|(_, shape)| matches!(shape.kind.as_str(), "r" | "p" | "f"))
        .map(|(name, _)| name)
        .collect();
    if strangers.is_empty() {
        return None;
    }
    let finding = at.error(
        "replica_not_empty",
        format!(
            "the replica holds {} before the first copy: {}",
            counted(strangers.len(), "table"),
            some_of(&strangers)
        ),
    );
    Some(finding.hint(format!(
        "replica.url leads to a database that somebody uses, or one that was renamed or promoted: {applier} refuses it, and \
         nothing is written there. Let replica.url lead elsewhere, or rename what is there"
    )))
}

/// A table that the replica lacks: before its copy that is as it should be.
fn missing(at: &FindingPlace, name: &TableName, kept: &Kept) -> Option<Finding> {
    if kept.progress.is_none() || kept.copying.contains(name) {
        return None;
    }
    let finding = if kept.copied.contains(name) {
        at.error(
            "table_missing",
            "was copied once and is gone from the replica",
        )
        .hint(remedy::copy_again(Some(&name.name)))
    } else {
        at.warning(
            "table_new",
            "is not on the replica yet: it is not protected",
        )
        .hint("dr-agent run publishes and copies it by itself, within half a minute; its log says what is in the way if it does not")
    };
    Some(finding.on(name))
}

fn copy_state(at: &FindingPlace, kept: &Kept, applier: &str) -> Option<Finding> {
    let waiting: BTreeSet<&TableName> = kept.copying.iter().collect();
    if waiting.is_empty() {
        return None;
    }
    let total = waiting.len() + kept.copied.len();
    let finding = at.warning(
        "copy_unfinished",
        format!(
            "{} of {total} tables are copied; promotion is refused until all are",
            kept.copied.len()
        ),
    );
    Some(finding.hint(format!(
        "{applier} goes on where it was; dr-agent status shows the progress"
    )))
}

#[cfg(test)]
mod tests {
    use super::super::shape::{ColumnShape, TableShape, Unique};
    use super::*;
    use crate::catalog::publication::Wanted;
    use crate::catalog::{Identity, Table};
    use crate::pg::PgLsn;
    use crate::schema::progress::Progress;

    fn at() -> FindingPlace {
        FindingPlace::database(FindingSide::Both, "app")
    }

    fn name(table: &str) -> TableName {
        TableName {
            schema: "s".to_owned(),
            name: table.to_owned(),
        }
    }

    fn shape() -> TableShape {
        TableShape {
            kind: "r".to_owned(),
            columns: vec![ColumnShape {
                name: "id".to_owned(),
                type_name: "integer".to_owned(),
                ..ColumnShape::default()
            }],
            uniques: vec![Unique {
                primary: true,
                valid: true,
                keys: vec!["id".to_owned()],
                ..Unique::default()
            }],
            ..TableShape::default()
        }
    }

    fn shapes(names: &[&str]) -> Shapes {
        names.iter().map(|one| (name(one), shape())).collect()
    }

    fn here(names: &[&str]) -> SourceDatabase {
        let tables = names.iter().map(|one| Table {
            virtual_generated: false,
            generated_key: false,
            oid: 7,
            name: name(one),
            root: name(one),
            identity: Identity::Key,
            unlogged: false,
            of_extension: false,
        });
        SourceDatabase {
            wanted: Wanted {
                published: tables.collect(),
                ..Wanted::default()
            },
            shapes: shapes(names),
            ..SourceDatabase::default()
        }
    }

    fn there(names: &[&str], copied: &[&str], copying: &[&str]) -> ReplicaDatabase {
        let set = |names: &[&str]| names.iter().map(|one| name(one)).collect();
        ReplicaDatabase {
            shapes: shapes(names),
            kept: Kept {
                progress: Some(Progress::testing(PgLsn::from(1))),
                copied: set(copied),
                copying: set(copying),
                ..Kept::default()
            },
            ..ReplicaDatabase::default()
        }
    }

    fn found(here: &SourceDatabase, there: &ReplicaDatabase) -> Vec<(Severity, &'static str)> {
        tables(&at(), here, there, "dr-agent run")
            .iter()
            .map(|f| (f.severity, f.code))
            .collect()
    }

    #[test]
    fn a_missing_table_is_judged_by_whether_it_was_ever_copied() {
        let source = here(&["a", "b"]);
        assert_eq!(
            found(&source, &there(&["a"], &["a", "b"], &[])),
            [(Severity::Error, "table_missing")]
        );
        assert_eq!(
            found(&source, &there(&["a"], &["a"], &[])),
            [(Severity::Warning, "table_new")]
        );
        assert_eq!(
            found(&source, &there(&["a"], &["a"], &["b"])),
            [(Severity::Warning, "copy_unfinished")]
        );
        assert_eq!(
            found(&source, &there(&["a", "b"], &["a", "b"], &[])),
            [(Severity::Ok, "tables")]
        );
    }

    #[test]
    fn a_table_being_copied_has_no_keys_yet_and_that_is_right() {
        let mut replica = there(&["a"], &[], &["a"]);
        replica.shapes.get_mut(&name("a")).unwrap().uniques.clear();
        assert_eq!(
            found(&here(&["a"]), &replica),
            [(Severity::Warning, "copy_unfinished")]
        );
        replica.kept.copied = std::mem::take(&mut replica.kept.copying);
        assert_eq!(
            found(&here(&["a"]), &replica),
            [(Severity::Error, "primary_key_missing")]
        );
    }

    #[test]
    fn a_dropped_publication_is_an_error_once_the_replica_counts_on_it() {
        let code = |begun| publication(&at(), "p", &here(&[]), begun).unwrap().code;
        assert_eq!(code(false), "publication");
        assert_eq!(code(true), "publication_missing");
    }

    #[test]
    fn a_replica_with_tables_before_the_first_copy_is_noticed() {
        let mut replica = there(&["a", "old"], &[], &[]);
        replica.kept = Kept::default();
        assert_eq!(
            found(&here(&["a"]), &replica),
            [(Severity::Error, "replica_not_empty")]
        );
    }

    #[test]
    fn an_extension_that_cannot_be_had_is_an_error() {
        let pair = |name: &str, version: &str| (name.to_owned(), version.to_owned());
        let source = [pair("citext", "1.6"), pair("postgis", "3.4")];
        let available = BTreeMap::from([pair("citext", "1.6")]);
        let codes = |installed: &[(String, String)]| -> Vec<&'static str> {
            extensions(&at(), &source, &available, installed)
                .iter()
                .map(|f| f.code)
                .collect()
        };
        assert_eq!(codes(&[]), ["extension_missing"]);
        assert_eq!(
            codes(&[pair("citext", "1.5"), pair("postgis", "3.4")]),
            ["extension_version"]
        );
    }

    #[test]
    fn locales_are_compared_by_what_decides_the_order() {
        let libc = |collate: &str, version: &str| LocaleFacts {
            encoding: "UTF8".to_owned(),
            collate: collate.to_owned(),
            ctype: collate.to_owned(),
            provider: "c".to_owned(),
            version: version.to_owned(),
            ..LocaleFacts::default()
        };
        let icu = LocaleFacts {
            provider: "i".to_owned(),
            provider_locale: "de-DE".to_owned(),
            ..libc("C", "153")
        };
        let codes = |one: &LocaleFacts, other: &LocaleFacts| -> Vec<&'static str> {
            locales(&at(), one, other).iter().map(|f| f.code).collect()
        };
        let german = libc("de_DE.UTF-8", "2.36");
        assert!(codes(&german, &german).is_empty());
        assert_eq!(
            codes(&german, &libc("de_DE.UTF-8", "2.39")),
            ["collation_version"]
        );
        assert_eq!(codes(&german, &libc("C", "")), ["locale"]);
        assert_eq!(codes(&german, &icu), ["locale"]);
        assert_eq!(
            codes(
                &icu,
                &LocaleFacts {
                    collate: "x".to_owned(),
                    ..icu.clone()
                }
            ),
            [""; 0]
        );
        let latin = LocaleFacts {
            encoding: "LATIN1".to_owned(),
            ..german.clone()
        };
        assert_eq!(codes(&german, &latin), ["encoding"]);
    }

    #[test]
    fn roles_the_replica_lacks_are_named() {
        let names = |names: &[&str]| -> Vec<String> {
            names.iter().map(|name| (*name).to_owned()).collect()
        };
        let at = FindingPlace::server(FindingSide::Replica);
        let finding = roles(&at, &names(&["app", "bi"]), &names(&["app", "postgres"])).unwrap();
        assert_eq!(finding.severity, Severity::Warning);
        assert!(finding.message.contains("bi") && !finding.message.contains("app"));
        let fine = roles(&at, &names(&["app"]), &names(&["app"])).unwrap();
        assert_eq!(fine.severity, Severity::Ok);
    }
}
