//! Columns of array type: their values travel in arrays of a domain.
//!
//! A statement takes one array per column, and PostgreSQL knows no arrays of arrays: an array of arrays is one of more
//! dimensions. But it knows arrays of a domain, and a domain may be over an array. So for each array type that comes in binary
//! form there is one in schema `dr_agent`, made when the first table with such a column is met: `array_of_int4` over `int4[]`.
//!
//! # What it does not do
//! Arrays of types that are not PostgreSQL's own come as text ([`crate::pg::binary`]); a domain over them would keep their owner
//! from dropping them.

use std::collections::BTreeSet;

use tokio_postgres::{Client, Row};

use super::SinkError;
use super::target::Native;
use crate::pg::quote::quote_ident;

/// Columns of a row of `target`'s query: the name of the element type, and the domain if it is there.
const ELEMENT: usize = 11;
const DOMAIN: usize = 12;

/// How values of the column travel, if it is an array; nothing where its domain is not there.
pub(super) fn of(row: &Row) -> Option<Option<Native>> {
    let element: &str = row.get::<_, Option<&str>>(ELEMENT)?;
    let domain: Option<u32> = row.get(DOMAIN);
    Some(domain.map(|element_oid| Native {
        array_sql: format!("dr_agent.{}[]", domain_of(element)),
        element_oid,
        is_boxed: true,
    }))
}

/// The element types of arrays whose domain is not there.
pub(super) fn missing(rows: &[Row]) -> BTreeSet<String> {
    let missing = rows
        .iter()
        .filter(|row| row.get::<_, Option<u32>>(DOMAIN).is_none());
    missing.filter_map(|row| row.get(ELEMENT)).collect()
}

/// Makes the domains. Another session may make them at the same moment.
pub(super) async fn create(client: &Client, elements: &BTreeSet<String>) -> Result<(), SinkError> {
    let create = elements.iter().map(|element| {
        format!(
            "BEGIN CREATE DOMAIN dr_agent.{} AS pg_catalog.{}[];
             EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END;",
            domain_of(element),
            quote_ident(element)
        )
    });
    let create: String = create.collect();
    client
        .batch_execute(&format!("DO $dr_agent$ BEGIN {create} END $dr_agent$"))
        .await?;
    Ok(())
}

fn domain_of(element: &str) -> String {
    quote_ident(&format!("array_of_{element}"))
}
