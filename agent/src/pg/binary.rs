//! ● Which types' binary form means the same on another server.
//!
//! Pure: it is SQL. Binary spares both servers the conversion to text and back, and a large `bytea` doubles as text. But what
//! refers to a catalog carries OIDs of it: `regclass` and its like, arrays and composite values of types that are not PostgreSQL's
//! own. The binary input of `tsquery` refuses the empty query that its output writes, that of `oidvector` and `int2vector` an
//! empty one.
//!
//! # What it does not do
//! Types of extensions stay text, whatever their form is: another version may read it otherwise.

/// OIDs below this are the same on every server, and in every version once given.
const FIRST_NOT_PINNED: u32 = 10_000;

/// Whether `type`, an alias of a row of `pg_type`, is a base type or range of PostgreSQL's own, and no array.
fn scalar(alias: &str) -> String {
    format!(
        "({alias}.typtype IN ('b', 'r', 'm') AND {alias}.oid < {FIRST_NOT_PINNED}
          AND {alias}.typcategory <> 'A' AND {alias}.typname <> 'tsquery' AND {alias}.typname NOT LIKE 'reg%')"
    )
}

/// The same, where the type is inside of another and has to have a binary form.
fn member(alias: &str) -> String {
    format!(
        "({} AND {alias}.typsend <> 0 AND {alias}.typreceive <> 0)",
        scalar(alias)
    )
}

/// Whether it is an array of such a type.
pub fn array_travels(alias: &str) -> String {
    format!(
        "({alias}.typtype = 'b' AND {alias}.typcategory = 'A' AND EXISTS (
              SELECT 1 FROM pg_catalog.pg_type {alias}_e
               WHERE {alias}_e.oid = {alias}.typelem AND {alias}_e.typarray = {alias}.oid AND {}))",
        member(&format!("{alias}_e"))
    )
}

/// Whether a value of this type, which is no domain, may travel in binary form: a base type, range or array of PostgreSQL's own,
/// a composite type of nothing but those, or an enum (whose form is its label).
pub fn travels(alias: &str) -> String {
    let field = format!("{alias}_f");
    format!(
        "({alias}.typtype = 'e' OR {} OR {} OR {alias}.typtype = 'c' AND NOT EXISTS (
              SELECT 1 FROM pg_catalog.pg_attribute {alias}_a JOIN pg_catalog.pg_type {field} ON {field}.oid = {alias}_a.atttypid
               WHERE {alias}_a.attrelid = {alias}.typrelid AND {alias}_a.attnum > 0 AND NOT {alias}_a.attisdropped
                 AND NOT ({} OR {})))",
        scalar(alias),
        array_travels(alias),
        member(&field),
        array_travels(&field),
    )
}
