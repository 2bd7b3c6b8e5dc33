//! ● The publication as it is, against the publication as it ought to be.
//!
//! Pure, but for [`read`]. A publication that sends less than every column of every row of every wanted
//! table loses data silently; one that sends a keyless table breaks the source's own statements.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::finding::{Finding, FindingPlace, counted, some_of};
use crate::names::TableName;
use crate::pg::PgError;
use crate::watch::coverage;

/// A publication.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PublicationFacts {
    /// FOR ALL TABLES.
    pub(super) all_tables: bool,
    /// `publish_via_partition_root`.
    pub(super) via_root: bool,
    /// The kinds of change it leaves out.
    pub(super) left_out: Vec<String>,
    /// Tables with a row filter or a column list.
    pub(super) filtered: Vec<String>,
    /// FOR TABLES IN SCHEMA.
    pub(super) schemas: Vec<String>,
    /// Our role may alter it.
    pub(super) owned: bool,
    /// The tables it lists.
    pub(super) tables: BTreeSet<TableName>,
}

/// Reads a publication; `None` where there is none of that name.
pub(super) async fn read(client: &Client, name: &str) -> Result<Option<PublicationFacts>, PgError> {
    // Row filters and column lists came with PostgreSQL 15 and are read through to_jsonb; the schema
    // list is a catalog of its own there, so it is a second statement.
    const SQL: &str = "
        SELECT p.puballtables, p.pubviaroot,
               ARRAY(SELECT k FROM (VALUES ('insert', p.pubinsert), ('update', p.pubupdate),
                                           ('delete', p.pubdelete), ('truncate', p.pubtruncate)) v(k, sent)
                      WHERE NOT sent),
               ARRAY(SELECT n.nspname || '.' || c.relname
                       FROM pg_publication_rel r
                       JOIN pg_class c ON c.oid = r.prrelid
                       JOIN pg_namespace n ON n.oid = c.relnamespace
                      WHERE r.prpubid = p.oid
                        AND (to_jsonb(r)->>'prqual' IS NOT NULL OR to_jsonb(r)->>'prattrs' IS NOT NULL)
                      ORDER BY 1),
               pg_has_role(p.pubowner, 'USAGE'), p.oid,
               current_setting('server_version_num')::int >= 150000
          FROM pg_publication p WHERE p.pubname = $1";
    let Some(row) = client.query_opt(SQL, &[&name]).await? else {
        return Ok(None);
    };
    let schemas = if row.get(6) {
        let sql = "SELECT n.nspname::text FROM pg_publication_namespace pn
             JOIN pg_namespace n ON n.oid = pn.pnnspid WHERE pn.pnpubid = $1 ORDER BY 1";
        let oid: u32 = row.get(5);
        let rows = client.query(sql, &[&oid]).await?;
        rows.iter().map(|row| row.get(0)).collect()
    } else {
        Vec::new()
    };
    Ok(Some(PublicationFacts {
        all_tables: row.get(0),
        via_root: row.get(1),
        left_out: row.get(2),
        filtered: row.get(3),
        schemas,
        owned: row.get(4),
        tables: coverage::listed(client, name).await?,
    }))
}

/// What is wrong with the publication `name`. Whether its absence is wrong depends on the replica:
/// see `pair`.
pub(super) fn judge(
    at: &FindingPlace,
    name: &str,
    publication: &PublicationFacts,
    wanted: &BTreeSet<TableName>,
) -> Vec<Finding> {
    let mut findings = shape(at, publication);
    let missing: Vec<&TableName> = wanted.difference(&publication.tables).collect();
    if !missing.is_empty() && !publication.all_tables {
        findings.push(
            at.warning(
                "publication_incomplete",
                format!(
                    "lacks {}, not protected until then: {}",
                    counted(missing.len(), "table"),
                    some_of(&missing)
                ),
            )
            .hint("dr-agent run publishes and copies them by itself; its log says what is in the way if it does not"),
        );
    }
    let extra: Vec<&TableName> = publication.tables.difference(wanted).collect();
    if !extra.is_empty() {
        findings.push(
            at.warning(
                "publication_extra",
                format!(
                    "lists {} that the configuration leaves out: {}",
                    counted(extra.len(), "table"),
                    some_of(&extra)
                ),
            )
            .hint("restart dr-agent run: it takes them off the list"),
        );
    }
    if findings.is_empty() {
        findings.push(at.ok("publication", counted(publication.tables.len(), "table")));
    }
    findings.into_iter().map(|f| f.on(name)).collect()
}

fn shape(at: &FindingPlace, publication: &PublicationFacts) -> Vec<Finding> {
    let mut wrong = Vec::new();
    if publication.all_tables {
        wrong.push("it is FOR ALL TABLES, keyless ones included".to_owned());
    }
    if !publication.schemas.is_empty() {
        wrong.push(format!(
            "it is FOR TABLES IN SCHEMA {}",
            some_of(&publication.schemas)
        ));
    }
    if publication.via_root {
        wrong.push("publish_via_partition_root is on".to_owned());
    }
    if !publication.left_out.is_empty() {
        wrong.push(format!("it leaves out {}", publication.left_out.join(", ")));
    }
    if !publication.filtered.is_empty() {
        wrong.push(format!(
            "row filters or column lists on {}",
            some_of(&publication.filtered)
        ));
    }
    let mendable = !publication.all_tables && publication.schemas.is_empty();
    let hint = match mendable {
        true => {
            "somebody altered it: changes are missing on the replica. dr-agent run mends it within seconds and copies again \
             what was published in part; start it if it does not run"
        }
        false => {
            "DROP PUBLICATION …; dr-agent run creates its own, or set source.slot to another name"
        }
    };
    wrong
        .into_iter()
        .map(|what| {
            at.error(
                "publication_shape",
                format!("was not made by dr-agent: {what}"),
            )
            .hint(hint)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::finding::{FindingSide, Severity};
    use super::*;

    fn names(names: &[&str]) -> BTreeSet<TableName> {
        names
            .iter()
            .map(|name| TableName {
                schema: "s".to_owned(),
                name: (*name).to_owned(),
            })
            .collect()
    }

    fn found(publication: &PublicationFacts, wanted: &[&str]) -> Vec<(Severity, &'static str)> {
        let at = FindingPlace::database(FindingSide::Source, "app");
        judge(&at, "dr_agent_app", publication, &names(wanted))
            .iter()
            .map(|f| (f.severity, f.code))
            .collect()
    }

    fn publication(tables: &[&str]) -> PublicationFacts {
        PublicationFacts {
            owned: true,
            tables: names(tables),
            ..PublicationFacts::default()
        }
    }

    #[test]
    fn the_wanted_list_is_compared_both_ways() {
        let have = publication(&["a", "b"]);
        assert_eq!(found(&have, &["a", "b"]), [(Severity::Ok, "publication")]);
        assert_eq!(
            found(&have, &["b", "c"]),
            [
                (Severity::Warning, "publication_incomplete"),
                (Severity::Warning, "publication_extra")
            ]
        );
    }

    #[test]
    fn a_publication_that_sends_less_than_everything_is_an_error() {
        for change in [
            |p: &mut PublicationFacts| p.left_out = vec!["delete".to_owned()],
            |p: &mut PublicationFacts| p.filtered = vec!["s.a".to_owned()],
            |p: &mut PublicationFacts| p.via_root = true,
            |p: &mut PublicationFacts| p.schemas = vec!["s".to_owned()],
        ] {
            let mut publication = publication(&["a"]);
            change(&mut publication);
            assert_eq!(
                found(&publication, &["a"]),
                [(Severity::Error, "publication_shape")]
            );
        }
    }

    #[test]
    fn for_all_tables_is_an_error_and_lacks_nothing() {
        let all = PublicationFacts {
            all_tables: true,
            ..publication(&[])
        };
        assert_eq!(
            found(&all, &["a"]),
            [(Severity::Error, "publication_shape")]
        );
    }
}
