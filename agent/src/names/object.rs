//! ● What an object is called on any server: what `pg_identify_object_as_address` says and `pg_get_object_address` takes.

use serde::{Deserialize, Serialize};

/// What `pg_get_object_address(type, names, args)` takes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectAddress {
    /// `table`, `index`, `function`, `policy`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// Its name in parts.
    pub names: Vec<String>,
    /// Arguments and the like.
    #[serde(default)]
    pub args: Vec<String>,
}
