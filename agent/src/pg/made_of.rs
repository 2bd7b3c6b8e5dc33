//! ● What a type of a server's own is made of, as a query says it.
//!
//! Pure: it is SQL. Of a domain the stream tells the type at its bottom and no modifier, of a composite type and an array the
//! name alone. So `numeric(8,1)` inside of one may be `numeric(8,3)` on the other side, and values would be rounded without a
//! word. Both sides say it here in the same words:
//!
//! ```text
//! public.price over numeric(8,1)
//! public.pair, attribute net public.price over numeric(8,1), attribute tax numeric(5,2)
//! ```
//!
//! # Invariants
//! - The words are the same in every version, on a session with our settings (`search_path`).
//! - Whatever can be cut or rounded has its modifier in it, in parentheses ([`may_cut`]).
//!
//! # What it does not do
//! Labels of an enum and constraints of a domain are not in it: a value that does not fit them is refused.

/// What the type with this OID, an expression of type `oid`, is made of, as a scalar subquery; NULL where there is none.
pub fn made_of(oid: &str) -> String {
    format!(
        "(WITH RECURSIVE part (way, type, told) AS (
              SELECT ARRAY[]::int[], o.oid, pg_catalog.format_type(o.oid, -1) COLLATE \"C\" FROM pg_catalog.pg_type o WHERE o.oid = {oid}
               UNION ALL
              SELECT part.way || step.place, step.type, step.told COLLATE \"C\"
                FROM part
                JOIN pg_catalog.pg_type p ON p.oid = part.type AND p.oid >= 10000
               CROSS JOIN LATERAL (
                      SELECT 0, p.typbasetype, ' over ' || pg_catalog.format_type(p.typbasetype, p.typtypmod)
                       WHERE p.typtype = 'd'
                       UNION ALL
                      SELECT 0, p.typelem, '' WHERE p.typtype = 'b' AND p.typcategory = 'A'
                       UNION ALL
                      SELECT f.attnum::int, f.atttypid, ', attribute ' || pg_catalog.quote_ident(f.attname) || ' '
                             || pg_catalog.format_type(f.atttypid, f.atttypmod)
                        FROM pg_catalog.pg_attribute f
                       WHERE p.typtype = 'c' AND f.attrelid = p.typrelid AND f.attnum > 0 AND NOT f.attisdropped
                       UNION ALL
                      SELECT 0, r.rngsubtype, ' of ' || pg_catalog.format_type(r.rngsubtype, -1)
                        FROM pg_catalog.pg_range r WHERE r.rngtypid = p.oid
                       UNION ALL
                      SELECT 0, r.rngtypid, '' FROM pg_catalog.pg_range r WHERE r.rngmultitypid = p.oid
                     ) AS step (place, type, told)
               WHERE pg_catalog.cardinality(part.way) < {DEPTH_MAX})
          SELECT pg_catalog.string_agg(told, '' ORDER BY way) FROM part)"
    )
}

/// PostgreSQL lets no type be part of itself; this bounds what a damaged catalog costs.
const DEPTH_MAX: u32 = 100;

/// Whether something that it is made of has a length or a precision.
pub fn may_cut(made_of: &str) -> bool {
    made_of.contains('(')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_length_or_a_precision_may_cut() {
        for (made_of, expected) in [
            ("public.mood", false),
            ("public.price over numeric", false),
            ("public.price over numeric(8,1)", true),
            (
                "public.pair, attribute a integer, attribute b character varying(3)",
                true,
            ),
        ] {
            assert_eq!(may_cut(made_of), expected, "{made_of}");
        }
    }
}
