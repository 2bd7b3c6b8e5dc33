//! ● Whether a table's rows may travel in COPY's binary format.
//!
//! Binary is several times cheaper for both servers, and right only where the bytes mean the same on
//! both. They do not where they carry object identifiers, which differ between servers: `regclass`
//! and its kin send the number of a row of a catalog, composite values and arrays the numbers of
//! their parts' types. Types that extensions define may change their binary form between versions
//! of the extension. All those go as text, as `pg_dump` sends everything.
//!
//! # Invariants
//! - A type that is not known here goes as text.

use std::collections::HashMap;

/// Object identifier of a type.
pub(super) type TypeOid = u32;

/// How a type is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// A base type.
    Base,
    /// Sent as its label.
    Enum,
    /// Sent as the type under it.
    Domain(TypeOid),
    /// Carries the element type's identifier.
    Array(TypeOid),
    /// Sent as bounds of this type, without identifiers. Multiranges too.
    Range(TypeOid),
    /// Composite types, whose fields carry identifiers, and whatever is new.
    Other,
}

/// What the decision needs to know of a type.
#[derive(Clone, Debug)]
pub(super) struct TypeInfo {
    /// Its name.
    pub(super) name: String,
    /// Part of every server of this major version, under the same identifier.
    pub(super) built_in: bool,
    /// Has functions to send and to receive its binary form.
    pub(super) has_binary: bool,
    /// How it is made.
    pub(super) shape: Shape,
}

/// Identifiers below this are assigned by hand in PostgreSQL's source and the same everywhere
/// (FirstGenbkiObjectId in access/transam.h).
pub(super) const FIRST_NOT_PINNED: TypeOid = 10_000;

/// Nesting deeper than this goes as text; PostgreSQL itself does not allow cycles.
const DEPTH_MAX: u32 = 16;

/// Whether values of this type may travel in binary.
pub(super) fn is_binary_safe(oid: TypeOid, types: &HashMap<TypeOid, TypeInfo>) -> bool {
    is_safe(oid, types, DEPTH_MAX)
}

fn is_safe(oid: TypeOid, types: &HashMap<TypeOid, TypeInfo>, depth: u32) -> bool {
    let Some(info) = types.get(&oid) else {
        return false;
    };
    if depth == 0 || !info.has_binary {
        return false;
    }
    match info.shape {
        // regclass, regtype, regrole …: numbers of rows in catalogs. tsquery: its binary input refuses
        // the empty query that its binary output writes ("operand not found").
        Shape::Base => info.built_in && !info.name.starts_with("reg") && info.name != "tsquery",
        Shape::Enum => true,
        Shape::Domain(base) => is_safe(base, types, depth - 1),
        Shape::Range(subtype) => is_safe(subtype, types, depth - 1),
        // oidvector and int2vector are arrays, and their binary input refuses the empty one.
        Shape::Array(element) => {
            info.built_in
                && !info.name.ends_with("vector")
                && types.get(&element).is_some_and(|element| element.built_in)
                && is_safe(element, types, depth - 1)
        }
        Shape::Other => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn types() -> HashMap<TypeOid, TypeInfo> {
        let list = [
            (23, "int4", Shape::Base),
            (1007, "_int4", Shape::Array(23)),
            (26, "oid", Shape::Base),
            (30, "oidvector", Shape::Array(26)),
            (2205, "regclass", Shape::Base),
            (2210, "_regclass", Shape::Array(2205)),
            (3904, "int4range", Shape::Range(23)),
            (16400, "mood", Shape::Enum),
            (16401, "_mood", Shape::Array(16400)),
            (16402, "point3", Shape::Other),
            (16403, "positive", Shape::Domain(23)),
            (16404, "numbers", Shape::Domain(1007)),
            (16405, "hstore", Shape::Base),
            (16406, "moodrange", Shape::Range(16400)),
            (16407, "tables", Shape::Domain(2210)),
        ];
        list.into_iter()
            .map(|(oid, name, shape)| {
                let info = TypeInfo {
                    name: name.to_owned(),
                    built_in: oid < FIRST_NOT_PINNED,
                    has_binary: true,
                    shape,
                };
                (oid, info)
            })
            .collect()
    }

    #[test]
    fn what_carries_identifiers_or_belongs_to_an_extension_goes_as_text() {
        let types = types();
        for oid in [23, 1007, 3904, 16400, 16403, 16404, 16406] {
            assert!(is_binary_safe(oid, &types), "{}", types[&oid].name);
        }
        for oid in [30, 2205, 2210, 16401, 16402, 16405, 16407] {
            assert!(!is_binary_safe(oid, &types), "{}", types[&oid].name);
        }
        assert!(!is_binary_safe(99_999, &types));
    }

    #[test]
    fn a_type_without_binary_functions_goes_as_text() {
        let mut types = types();
        types.get_mut(&23).unwrap().has_binary = false;
        assert!(!is_binary_safe(23, &types));
        assert!(!is_binary_safe(1007, &types));
    }
}
