//! Whether a new database can hold the text of the old one, and sorts it alike.

use tokio_postgres::Client;

use super::RestoreError;
use crate::catalog;
use crate::copy::locale::{self, Locale, Provider};
use crate::pg::PgError;

/// A database of this encoding takes every byte as it is.
const ANY: &str = "SQL_ASCII";

/// Refuses a database of another encoding; says what a different locale means.
///
/// # Errors
/// [`RestoreError::Encoding`]
pub(super) async fn check(
    client: &Client,
    source: &Locale,
) -> Result<Option<String>, RestoreError> {
    let reading = |error: PgError| RestoreError::target("read its locale")(error);
    let version = catalog::server_version(client).await.map_err(reading)?;
    let target = locale::locale(client, version).await.map_err(reading)?;
    if target.encoding != source.encoding && target.encoding != ANY {
        return Err(RestoreError::Encoding {
            wanted: Box::new(source.clone()),
            target: target.encoding,
        });
    }
    Ok(difference(source, &target))
}

fn difference(source: &Locale, target: &Locale) -> Option<String> {
    if target.encoding != source.encoding {
        return Some(format!(
            "the target's encoding is {}, the source's was {}: nothing checks text there",
            target.encoding, source.encoding
        ));
    }
    let (there, here) = (described(source), described(target));
    (there != here).then(|| {
        format!(
            "the target's locale is {here}, the source's was {there}: text without a COLLATE of its own sorts differently"
        )
    })
}

/// Alike for what is the same by another spelling, `C.utf8` and `C.UTF-8` for instance.
fn described(locale: &Locale) -> String {
    let plain = |name: &str| name.to_lowercase().replace('-', "");
    match &locale.provider {
        Provider::Icu(name) => format!("icu {name}"),
        Provider::Builtin(name) => format!("builtin {name}"),
        Provider::Libc if plain(&locale.collate) == plain(&locale.ctype) => plain(&locale.collate),
        Provider::Libc => format!("{}, {}", plain(&locale.collate), plain(&locale.ctype)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(provider: Provider, collate: &str, encoding: &str) -> Locale {
        Locale {
            encoding: encoding.to_owned(),
            provider,
            collate: collate.to_owned(),
            ctype: collate.to_owned(),
            owner: "app".to_owned(),
            icu_rules: None,
        }
    }

    #[test]
    fn another_spelling_is_no_difference_and_another_locale_is() {
        let source = of(Provider::Libc, "C.UTF-8", "UTF8");
        assert_eq!(
            difference(&source, &of(Provider::Libc, "C.utf8", "UTF8")),
            None
        );
        let german = of(Provider::Icu("de".to_owned()), "C.UTF-8", "UTF8");
        let said = difference(&source, &german).unwrap();
        assert!(said.contains("icu de") && said.contains("c.utf8"), "{said}");
        assert!(difference(&source, &of(Provider::Libc, "C.UTF-8", ANY)).is_some());
    }
}
