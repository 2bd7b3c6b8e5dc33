//! `[route]`: how batches reach the replica.

use serde::Deserialize;

use super::{ConfigError, Databases, Source, value};

/// What stands for the database in `route.stream`.
const DATABASE: &str = "{database}";

/// Longest name of a Kinesis stream.
const NAME_MAX: usize = 128;

/// The section as written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawRoute {
    kind: Option<RouteKind>,
    stream: Option<String>,
}

/// `route.kind`
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RouteKind {
    #[default]
    Direct,
    Kinesis,
}

/// `[route]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// `run` applies to the replica itself.
    Direct,
    /// `run` puts batches into a Kinesis stream, `apply` reads them beside the replica.
    Kinesis {
        /// The Kinesis stream's name, as configured.
        stream: String,
    },
}

impl Route {
    /// The Kinesis stream of a database, where there is one.
    pub fn kinesis_stream(&self, database: &str) -> Option<String> {
        match self {
            Self::Direct => None,
            Self::Kinesis { stream } => Some(stream.replace(DATABASE, database)),
        }
    }

    /// The command that writes to the replica, for messages.
    pub fn applier(&self) -> &'static str {
        match self {
            Self::Direct => "dr-agent run",
            Self::Kinesis { .. } => "dr-agent apply",
        }
    }
}

impl RawRoute {
    pub(super) fn resolve(self, source: &Source) -> Result<Route, ConfigError> {
        let stream = match (self.kind.unwrap_or_default(), self.stream) {
            (RouteKind::Direct, None) => return Ok(Route::Direct),
            (RouteKind::Direct, Some(_)) => {
                return Err(value("route.stream", "belongs to route.kind = \"kinesis\""));
            }
            (RouteKind::Kinesis, None) => {
                return Err(value("route.stream", "is missing; name the Kinesis stream"));
            }
            (RouteKind::Kinesis, Some(stream)) => stream,
        };
        let fits = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        let bare = stream.replace(DATABASE, "");
        if stream.is_empty() || stream.len() > NAME_MAX || !bare.chars().all(fits) {
            return Err(value(
                "route.stream",
                "a Kinesis stream's name has 1 to 128 letters, digits, underscores, hyphens and periods; {database} stands \
                 for the database",
            ));
        }
        // Beside the replica there may be no source to ask.
        if source.databases == Databases::All {
            return Err(value(
                "source.databases",
                "must name the databases under route.kind = \"kinesis\": both sides go by the list",
            ));
        }
        Ok(Route::Kinesis { stream })
    }
}
