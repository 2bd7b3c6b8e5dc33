//! How a database of the source orders and classifies characters, and how to create one that does the same.
//!
//! Read by the set-up, which creates the replica's database, and by base backups, which keep it.

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use crate::pg::PgError;
use crate::pg::quote::{quote_ident, quote_literal};

/// How a database orders and classifies characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Locale {
    /// `UTF8`
    pub encoding: String,
    /// Who knows the locale.
    pub provider: Provider,
    /// LC_COLLATE
    pub collate: String,
    /// LC_CTYPE
    pub ctype: String,
    /// The role that owns the database.
    pub owner: String,
    /// Rules of its own beside those of an ICU locale (16 and later).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icu_rules: Option<String>,
}

/// Who knows the locale.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// The operating system.
    Libc,
    /// ICU (15 and later), with its locale.
    Icu(String),
    /// PostgreSQL itself (17 and later), with its locale.
    Builtin(String),
}

/// Reads that of the database this client is connected to; `version` is its `server_version_num`.
pub(crate) async fn locale(source: &Client, version: i32) -> Result<Locale, PgError> {
    let (provider, name) = match version / 10_000 {
        14 => ("'c'", "''"),
        15 | 16 => ("datlocprovider::text", "coalesce(daticulocale, '')"),
        _ => ("datlocprovider::text", "coalesce(datlocale, '')"),
    };
    let sql = format!(
        "SELECT pg_encoding_to_char(encoding)::text, {provider}, {name}, datcollate::text,
                datctype::text, pg_get_userbyid(datdba)::text, to_jsonb(d) ->> 'daticurules'
           FROM pg_database d WHERE datname = current_database()"
    );
    let row = source.query_one(&sql, &[]).await?;
    Ok(Locale {
        encoding: row.get(0),
        provider: match row.get::<_, &str>(1) {
            "i" => Provider::Icu(row.get(2)),
            "b" => Provider::Builtin(row.get(2)),
            _ => Provider::Libc,
        },
        collate: row.get(3),
        ctype: row.get(4),
        owner: row.get(5),
        icu_rules: row.get(6),
    })
}

impl Locale {
    /// The statements to try, best first: the same locale, then ones every server has.
    pub(crate) fn create_database(&self, database: &str, version: i32) -> Vec<String> {
        let with = |locale: String| {
            format!(
                "CREATE DATABASE {} TEMPLATE template0 ENCODING {}{locale}",
                quote_ident(database),
                quote_literal(&self.encoding)
            )
        };
        let libc = |collate: &str, ctype: &str| {
            let provider = if version >= 150_000 {
                " LOCALE_PROVIDER libc"
            } else {
                ""
            };
            format!(
                "{provider} LC_COLLATE {} LC_CTYPE {}",
                quote_literal(collate),
                quote_literal(ctype)
            )
        };
        let mut candidates = Vec::new();
        match &self.provider {
            Provider::Libc => candidates.push(with(libc(&self.collate, &self.ctype))),
            Provider::Icu(name) if version >= 150_000 => candidates.push(with(format!(
                " LOCALE_PROVIDER icu ICU_LOCALE {} LC_COLLATE {} LC_CTYPE {}{}",
                quote_literal(name),
                quote_literal(&self.collate),
                quote_literal(&self.ctype),
                match &self.icu_rules {
                    Some(rules) if version >= 160_000 =>
                        format!(" ICU_RULES {}", quote_literal(rules)),
                    _ => String::new(),
                }
            ))),
            Provider::Builtin(name) if version >= 170_000 => candidates.push(with(format!(
                " LOCALE_PROVIDER builtin BUILTIN_LOCALE {} LC_COLLATE {} LC_CTYPE {}",
                quote_literal(name),
                quote_literal(&self.collate),
                quote_literal(&self.ctype)
            ))),
            Provider::Icu(_) | Provider::Builtin(_) => {}
        }
        if self.encoding == "UTF8" {
            candidates.push(with(libc("C.UTF-8", "C.UTF-8")));
        }
        candidates.push(with(libc("C", "C")));
        candidates.dedup();
        candidates
    }
}

impl Locale {
    /// Whether a server of this version can have this locale at all.
    pub(crate) fn is_known(&self, version: i32) -> bool {
        match self.provider {
            Provider::Libc => true,
            Provider::Icu(_) => {
                version
                    >= if self.icu_rules.is_some() {
                        160_000
                    } else {
                        150_000
                    }
            }
            Provider::Builtin(_) => version >= 170_000,
        }
    }

    pub(crate) fn name(&self) -> &str {
        match &self.provider {
            Provider::Libc => &self.collate,
            Provider::Icu(name) | Provider::Builtin(name) => name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn german(provider: Provider) -> Locale {
        Locale {
            encoding: "UTF8".to_owned(),
            provider,
            collate: "de_DE.UTF-8".to_owned(),
            ctype: "de_DE.UTF-8".to_owned(),
            owner: "app".to_owned(),
            icu_rules: None,
        }
    }

    #[test]
    fn the_same_locale_is_tried_before_those_every_server_has() {
        let tried = german(Provider::Libc).create_database("a\"b", 140_000);
        assert_eq!(
            tried,
            [
                "CREATE DATABASE \"a\"\"b\" TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE \
                 'de_DE.UTF-8' LC_CTYPE 'de_DE.UTF-8'",
                "CREATE DATABASE \"a\"\"b\" TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE \
                 'C.UTF-8' LC_CTYPE 'C.UTF-8'",
                "CREATE DATABASE \"a\"\"b\" TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' \
                 LC_CTYPE 'C'",
            ]
        );
    }

    #[test]
    fn an_icu_locale_is_only_asked_of_a_server_that_knows_icu() {
        let icu = german(Provider::Icu("de-DE".to_owned()));
        assert!(icu.create_database("x", 160_000)[0].contains("ICU_LOCALE 'de-DE'"));
        assert!(!icu.create_database("x", 140_000)[0].contains("ICU_LOCALE"));
        let mut ruled = icu.clone();
        ruled.icu_rules = Some("&a < g".to_owned());
        assert!(ruled.create_database("x", 160_000)[0].contains("ICU_RULES '&a < g'"));
        assert!(!ruled.create_database("x", 150_000)[0].contains("ICU_RULES"));
        assert!(ruled.is_known(160_000) && !ruled.is_known(150_000));
        assert!(!icu.is_known(140_000));
        let builtin = german(Provider::Builtin("C.UTF-8".to_owned()));
        assert!(builtin.create_database("x", 170_000)[0].contains("BUILTIN_LOCALE 'C.UTF-8'"));
        assert!(!builtin.create_database("x", 160_000)[0].contains("BUILTIN_LOCALE"));
    }
}
