//! ● Configuration: what the file says (`RawConfig`) becomes what the program uses ([`Config`]).
//!
//! Pure: text and environment come in as arguments. `resolve` is the only place where defaults,
//! units and limits are decided; after it, every value is valid and has a unit in its type.
//!
//! # Invariants
//! - Unknown keys are errors, in the file and in `DR_AGENT__SECTION__KEY` overrides alike.
//! - A setting that this version does not carry out is refused, never silently ignored.
//! - No password is stored in a printable field.

mod archive;
pub mod reload;
mod route;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::error::{Class, Classify};
use crate::names::stream::StreamName;
use crate::pg::{ConnInfo, ConnInfoError};
pub use archive::Archive;
use archive::RawArchive;
use route::RawRoute;
pub use route::Route;

/// Where the configuration is looked for when neither `--config` nor `DR_AGENT_CONFIG` names it.
pub const DEFAULT_PATH: &str = "/etc/dr-agent/dr-agent.toml";

/// What begins every environment variable that overrides a key: `DR_AGENT__SOURCE__URL`.
pub const OVERRIDE_PREFIX: &str = "DR_AGENT__";

/// Why a configuration is not usable. Exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The text is not TOML, or holds a key that does not exist, or a value of the wrong type.
    #[error("{origin}: {message}")]
    Syntax {
        /// The file, or the environment variable.
        origin: String,
        /// What the parser says, with line and column.
        message: String,
    },
    /// A value is there but cannot be meant.
    #[error("{key}: {message}")]
    Value {
        /// The key, as `section.key`.
        key: &'static str,
        /// What is wrong and what would be right.
        message: String,
    },
    /// A connection URL cannot be used.
    #[error("{key}")]
    Url {
        /// The key, as `section.key`.
        key: &'static str,
        /// What is wrong with it.
        #[source]
        source: ConnInfoError,
    },
}

impl Classify for ConfigError {
    fn class(&self) -> Class {
        Class::Definite
    }
}

/// The file as written. Every field is optional here so that [`RawConfig::resolve`] can say what is missing.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawConfig {
    source: RawSource,
    replica: RawReplica,
    objectives: RawObjectives,
    route: RawRoute,
    archive: Option<RawArchive>,
    http: RawHttp,
    limits: RawLimits,
    copy: RawCopy,
    promote: RawPromote,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawSource {
    url: Option<String>,
    password_file: Option<PathBuf>,
    databases: Option<Vec<String>>,
    slot: Option<String>,
    keyless: Option<Keyless>,
    ddl: Option<Ddl>,
    exclude: Vec<String>,
    heartbeat: Option<String>,
    sequences: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawReplica {
    url: Option<String>,
    password_file: Option<PathBuf>,
    lanes: Option<u16>,
    set_aside: Option<SetAside>,
    bandwidth: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawObjectives {
    rpo: Option<String>,
    rto: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawHttp {
    listen: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLimits {
    batch_bytes: Option<String>,
    batch_changes: Option<u64>,
    spread_changes: Option<u64>,
    index_bytes: Option<String>,
    queue_bytes: Option<String>,
    transaction_bytes: Option<String>,
    catch_up_bytes: Option<String>,
    spill_bytes: Option<String>,
    spill_directory: Option<PathBuf>,
    retry_max: Option<String>,
    shutdown_grace: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawCopy {
    jobs: Option<u16>,
    pg_bin: Option<PathBuf>,
    split_bytes: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawPromote {
    hook: Vec<RawHook>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHook {
    name: String,
    command: Vec<String>,
    timeout: Option<String>,
    on_failure: Option<OnFailure>,
}

/// What happens to tables without a key (`source.keyless`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Keyless {
    /// Nothing is published until a person has decided; `check` lists the tables.
    #[default]
    Refuse,
    /// They get `REPLICA IDENTITY FULL`.
    Full,
    /// They stay out of the publication and count as unprotected.
    Exclude,
}

impl Keyless {
    /// As the file says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::Full => "full",
            Self::Exclude => "exclude",
        }
    }
}

/// What becomes of the source's commands that define things (`source.ddl`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ddl {
    /// Event triggers on the source write them down, and the replica follows at the same place of the stream.
    #[default]
    Replicate,
    /// No event triggers are installed, and those that are there are removed: somebody else sees to it.
    Off,
}

/// What becomes of a database where one of its tables cannot be created, copied or applied (`replica.set_aside`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SetAside {
    /// The table is set aside and tried again; the rest goes on. Late tables are copied beside the stream.
    #[default]
    Retry,
    /// It stops. Late tables are copied while the stream waits.
    Never,
}

/// What a failed promotion hook does (`promote.hook.on_failure`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// The next hook runs; the report shows the failure.
    #[default]
    Continue,
    /// No further hook runs; the promotion itself stands.
    Abort,
}

/// The configuration in use: valid, with units.
#[derive(Clone, Debug)]
pub struct Config {
    /// The server we tail.
    pub source: Source,
    /// The server we keep ready.
    pub replica: Replica,
    /// What the operator promised the business.
    pub objectives: Objectives,
    /// Every limit on memory, disk and time.
    pub limits: Limits,
    /// The initial copy.
    pub copy: CopySettings,
    /// How batches reach the replica.
    pub route: Route,
    /// Base backups and the change log, if there shall be any.
    pub archive: Option<Archive>,
    /// Address of `/metrics`, `/status`, `/healthz`, `/readyz`.
    pub http_listen: SocketAddr,
    /// Commands run in order once a promoted replica is open.
    pub hooks: Vec<Hook>,
}

/// `[source]`
#[derive(Clone, Debug)]
pub struct Source {
    /// How to reach it; its database name is only where discovery starts.
    pub conninfo: ConnInfo,
    /// Which databases.
    pub databases: Databases,
    /// What slots and publications are named after.
    pub slot: String,
    /// What happens to tables without a key.
    pub keyless: Keyless,
    /// What becomes of its commands that define things.
    pub ddl: Ddl,
    /// Tables left out.
    pub exclude: Vec<TablePattern>,
    /// How often the heartbeat row is written.
    pub heartbeat_every: Duration,
    /// How often sequences are looked at.
    pub sequences_every: Duration,
}

/// `source.databases`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Databases {
    /// `["*"]`: every database that allows connections and is not a template.
    All,
    /// These.
    List(Vec<String>),
}

/// `[replica]`
#[derive(Clone, Debug)]
pub struct Replica {
    /// How to reach it; its database name is the one to connect to for creating others.
    pub conninfo: ConnInfo,
    /// Replica connections that apply in parallel.
    pub lanes: u16,
    /// What becomes of the others when one table is in trouble.
    pub set_aside: SetAside,
}

/// `[objectives]`
#[derive(Clone, Copy, Debug)]
pub struct Objectives {
    /// Largest acceptable loss.
    pub rpo: Duration,
    /// Largest acceptable time to writable.
    pub rto: Duration,
}

/// `[limits]`: memory, disk and time. Per database.
#[derive(Clone, Debug)]
pub struct Limits {
    /// A batch is closed at this many bytes of pgoutput messages.
    pub batch_bytes: u64,
    /// A batch is closed at this many changes.
    pub batch_changes: u64,
    /// Net changes from which a batch is spread over lanes.
    pub spread_changes: u64,
    /// On a table larger than this a new index that is not unique is built beside the stream.
    pub index_bytes: u64,
    /// Received and not yet applied transactions held in memory, in bytes.
    pub queue_bytes: u64,
    /// A transaction above this many bytes continues in a spill file.
    pub transaction_bytes: u64,
    /// A backlog of at least this many bytes of WAL is read in windows.
    pub catch_up_bytes: u64,
    /// Spill files of one database together, in bytes on disk.
    pub spill_bytes: u64,
    /// Where spill files live.
    pub spill_directory: PathBuf,
    /// Longest pause between two attempts.
    pub retry_max: Duration,
    /// How long a stopping agent may take to finish its batch.
    pub shutdown_grace: Duration,
}

/// `[copy]`: the initial copy.
#[derive(Clone, Debug)]
pub struct CopySettings {
    /// Tables, or parts of tables, copied at the same time.
    pub jobs: u16,
    /// Directory of `pg_dump` and `pg_restore`; `None` means `PATH`.
    pub pg_bin: Option<PathBuf>,
    /// Tables larger than this are split by ctid range.
    pub split_bytes: u64,
}

/// `[[promote.hook]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// What the report calls it.
    pub name: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// It is killed after this long.
    pub timeout: Duration,
    /// What happens when it fails.
    pub on_failure: OnFailure,
}

/// A pattern of `source.exclude`: `schema.table`, where `*` stands for any characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablePattern(String);

impl TablePattern {
    /// Reads a pattern; it must name the schema.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.contains('.') {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!(
                "\"{text}\" names no schema; write \"public.{text}\" or \"*.{text}\""
            ))
        }
    }

    /// The same for LIKE in SQL.
    pub fn like(&self) -> String {
        let escaped = self
            .0
            .replace('\\', "\\\\")
            .replace('%', "\\%")
            .replace('_', "\\_");
        escaped.replace('*', "%")
    }

    /// Whether a table is meant.
    pub fn matches(&self, schema: &str, table: &str) -> bool {
        wildcard(self.0.as_bytes(), format!("{schema}.{table}").as_bytes())
    }
}

fn wildcard(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|skip| wildcard(rest, &text[skip..])),
        Some((first, rest)) => text
            .split_first()
            .is_some_and(|(c, tail)| c == first && wildcard(rest, tail)),
    }
}

impl Config {
    /// Parses the text of a configuration file, applies `DR_AGENT__SECTION__KEY` overrides from
    /// `environment`, and resolves the result. `origin` names the file in messages.
    pub fn parse(
        origin: &str,
        text: &str,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let mut table: toml::Table =
            text.parse()
                .map_err(|error: toml::de::Error| ConfigError::Syntax {
                    origin: origin.to_owned(),
                    message: error.to_string().trim_end().to_owned(),
                })?;
        let overridden = apply_overrides(&mut table, environment)?;
        let raw = if overridden {
            RawConfig::deserialize(table)
        } else {
            // From the text, so that messages carry line and column.
            toml::from_str(text)
        };
        raw.map_err(|error| ConfigError::Syntax {
            origin: origin.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?
        .resolve()
    }

    /// The name of the stream of `database`: its slot, publication and progress row.
    pub fn stream(&self, database: &str) -> StreamName {
        StreamName::new(&self.source.slot, database)
    }

    /// Whether `source.exclude` leaves this table out.
    pub fn excludes(&self, schema: &str, table: &str) -> bool {
        self.source
            .exclude
            .iter()
            .any(|pattern| pattern.matches(schema, table))
    }
}

/// Puts overrides into the table; returns whether there were any.
fn apply_overrides(
    table: &mut toml::Table,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<bool, ConfigError> {
    let overrides: BTreeMap<String, String> = environment
        .into_iter()
        .filter(|(name, _)| name.starts_with(OVERRIDE_PREFIX))
        .collect();
    for (name, value) in &overrides {
        let path = name[OVERRIDE_PREFIX.len()..].to_lowercase();
        let Some((section, key)) = path.split_once("__") else {
            return Err(ConfigError::Syntax {
                origin: name.clone(),
                message: format!("write {OVERRIDE_PREFIX}SECTION__KEY"),
            });
        };
        let section = table
            .entry(section.to_owned())
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()
            .ok_or_else(|| ConfigError::Syntax {
                origin: name.clone(),
                message: "names no section of the configuration".to_owned(),
            })?;
        section.insert(key.to_owned(), override_value(value));
    }
    Ok(!overrides.is_empty())
}

/// A number, boolean or list is written as in TOML; anything else is a string.
fn override_value(text: &str) -> toml::Value {
    let parsed = format!("value = {text}").parse::<toml::Table>().ok();
    match parsed.and_then(|mut table| table.remove("value")) {
        Some(value) if !value.is_str() => value,
        _ => toml::Value::String(text.trim_matches('"').to_owned()),
    }
}

impl RawConfig {
    fn resolve(self) -> Result<Config, ConfigError> {
        let source = self.source.resolve()?;
        let mut to_replica = conninfo("replica.url", self.replica.url, self.replica.password_file)?;
        if let Some(bandwidth) = self.replica.bandwidth {
            let per_second = bytes("replica.bandwidth", Some(bandwidth), "")?;
            to_replica = to_replica.with_bandwidth(per_second);
        }
        let replica = Replica {
            conninfo: to_replica,
            set_aside: self.replica.set_aside.unwrap_or_default(),
            lanes: within("replica.lanes", self.replica.lanes.unwrap_or(4), 1, 64)?,
        };
        let objectives = Objectives {
            rpo: duration("objectives.rpo", self.objectives.rpo, "30s")?,
            rto: duration("objectives.rto", self.objectives.rto, "5m")?,
        };
        let listen = self
            .http
            .listen
            .unwrap_or_else(|| "127.0.0.1:9717".to_owned());
        let http_listen = listen.parse().map_err(|_| ConfigError::Value {
            key: "http.listen",
            message: format!("\"{listen}\" is not an address and port such as 127.0.0.1:9717"),
        })?;
        Ok(Config {
            route: self.route.resolve(&source)?,
            source,
            replica,
            objectives,
            limits: self.limits.resolve()?,
            copy: self.copy.resolve()?,
            archive: self.archive.map(RawArchive::resolve).transpose()?,
            http_listen,
            hooks: self
                .promote
                .hook
                .into_iter()
                .map(RawHook::resolve)
                .collect::<Result<_, _>>()?,
        })
    }
}

impl RawSource {
    fn resolve(self) -> Result<Source, ConfigError> {
        let databases = self.databases.unwrap_or_else(|| vec!["*".to_owned()]);
        let databases = match databases.as_slice() {
            [star] if star == "*" => Databases::All,
            [] => {
                return Err(value(
                    "source.databases",
                    "is empty; write [\"*\"] or name databases",
                ));
            }
            list if list.iter().any(|name| name == "*") => {
                return Err(value("source.databases", "\"*\" stands alone"));
            }
            _ => Databases::List(databases),
        };
        let slot = self.slot.unwrap_or_else(|| "dr_agent".to_owned());
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if slot.is_empty() || slot.len() > 32 || !slot.chars().all(fits) {
            return Err(value(
                "source.slot",
                "a slot name has 1 to 32 lower-case letters, digits and underscores",
            ));
        }
        let exclude = self
            .exclude
            .iter()
            .map(|text| TablePattern::parse(text))
            .collect::<Result<_, _>>()
            .map_err(|message| ConfigError::Value {
                key: "source.exclude",
                message,
            })?;
        Ok(Source {
            conninfo: conninfo("source.url", self.url, self.password_file)?,
            databases,
            slot,
            keyless: self.keyless.unwrap_or_default(),
            ddl: self.ddl.unwrap_or_default(),
            exclude,
            heartbeat_every: duration("source.heartbeat", self.heartbeat, "1s")?,
            sequences_every: duration("source.sequences", self.sequences, "5s")?,
        })
    }
}

impl RawLimits {
    fn resolve(self) -> Result<Limits, ConfigError> {
        Ok(Limits {
            batch_bytes: bytes("limits.batch_bytes", self.batch_bytes, "8MiB")?,
            batch_changes: within(
                "limits.batch_changes",
                self.batch_changes.unwrap_or(200_000),
                1,
                10_000_000,
            )?,
            index_bytes: bytes("limits.index_bytes", self.index_bytes, "128MiB")?,
            spread_changes: within(
                "limits.spread_changes",
                self.spread_changes.unwrap_or(10_000),
                1,
                10_000_000,
            )?,
            queue_bytes: bytes("limits.queue_bytes", self.queue_bytes, "32MiB")?,
            transaction_bytes: bytes("limits.transaction_bytes", self.transaction_bytes, "16MiB")?,
            catch_up_bytes: bytes("limits.catch_up_bytes", self.catch_up_bytes, "16MiB")?,
            spill_bytes: bytes("limits.spill_bytes", self.spill_bytes, "20GiB")?,
            spill_directory: self
                .spill_directory
                .unwrap_or_else(|| PathBuf::from("/var/lib/dr-agent/spill")),
            retry_max: duration("limits.retry_max", self.retry_max, "30s")?,
            shutdown_grace: duration("limits.shutdown_grace", self.shutdown_grace, "30s")?,
        })
    }
}

impl RawCopy {
    fn resolve(self) -> Result<CopySettings, ConfigError> {
        Ok(CopySettings {
            jobs: within("copy.jobs", self.jobs.unwrap_or(4), 1, 64)?,
            pg_bin: self.pg_bin,
            split_bytes: bytes("copy.split_bytes", self.split_bytes, "1GiB")?,
        })
    }
}

impl RawHook {
    fn resolve(self) -> Result<Hook, ConfigError> {
        if self.command.is_empty() {
            return Err(value(
                "promote.hook.command",
                "is empty; write the program and its arguments",
            ));
        }
        Ok(Hook {
            name: self.name,
            command: self.command,
            timeout: duration("promote.hook.timeout", self.timeout, "60s")?,
            on_failure: self.on_failure.unwrap_or_default(),
        })
    }
}

fn value(key: &'static str, message: &str) -> ConfigError {
    ConfigError::Value {
        key,
        message: message.to_owned(),
    }
}

fn conninfo(
    key: &'static str,
    url: Option<String>,
    password_file: Option<PathBuf>,
) -> Result<ConnInfo, ConfigError> {
    let url = url.ok_or_else(|| value(key, "is missing; write postgres://user@host/database"))?;
    ConnInfo::parse(&url, password_file).map_err(|source| ConfigError::Url { key, source })
}

fn duration(
    key: &'static str,
    text: Option<String>,
    default: &str,
) -> Result<Duration, ConfigError> {
    let text = text.unwrap_or_else(|| default.to_owned());
    match humantime::parse_duration(&text) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        Ok(_) => Err(value(key, "must be more than zero")),
        Err(error) => Err(ConfigError::Value {
            key,
            message: format!("\"{text}\" is not a duration such as 30s, 5m or 24h: {error}"),
        }),
    }
}

fn bytes(key: &'static str, text: Option<String>, default: &str) -> Result<u64, ConfigError> {
    let text = text.unwrap_or_else(|| default.to_owned());
    match text.parse::<bytesize::ByteSize>() {
        Ok(size) if size.as_u64() > 0 => Ok(size.as_u64()),
        Ok(_) => Err(value(key, "must be more than zero")),
        Err(_) => Err(ConfigError::Value {
            key,
            message: format!("\"{text}\" is not a size such as 512KiB, 64MiB or 20GiB"),
        }),
    }
}

fn within<N>(key: &'static str, number: N, low: N, high: N) -> Result<N, ConfigError>
where
    N: PartialOrd + std::fmt::Display + Copy,
{
    if number < low || number > high {
        let message = format!("{number} is not between {low} and {high}");
        return Err(ConfigError::Value { key, message });
    }
    Ok(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = "[source]\nurl = \"postgres://a@localhost/x\"\n[replica]\nurl = \"postgres://b@localhost/y\"\n";

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse("dr-agent.toml", text, [])
    }

    #[test]
    fn two_urls_are_enough() {
        let config = parse(LEAST).unwrap();
        assert_eq!(config.objectives.rpo, Duration::from_secs(30));
        assert_eq!(config.source.databases, Databases::All);
        assert_eq!(config.stream("app").as_str(), "dr_agent_app");
    }

    #[test]
    fn a_misspelt_key_is_an_error_that_names_it() {
        let error = parse(&format!("{LEAST}[objectives]\nrop = \"1s\"\n")).unwrap_err();
        assert!(error.to_string().contains("rop"), "{error}");
        let error = Config::parse(
            "f",
            LEAST,
            [("DR_AGENT__SOURCE__SLOTT".to_owned(), "x".to_owned())],
        )
        .unwrap_err();
        assert!(error.to_string().contains("slott"), "{error}");
    }

    #[test]
    fn the_environment_overrides_the_file() {
        let environment = [
            ("DR_AGENT__OBJECTIVES__RPO".to_owned(), "5s".to_owned()),
            (
                "DR_AGENT__SOURCE__DATABASES".to_owned(),
                "[\"a\", \"b\"]".to_owned(),
            ),
            ("DR_AGENT__LIMITS__BATCH_CHANGES".to_owned(), "7".to_owned()),
            ("PATH".to_owned(), "/bin".to_owned()),
        ];
        let config = Config::parse("f", LEAST, environment).unwrap();
        assert_eq!(config.objectives.rpo, Duration::from_secs(5));
        assert_eq!(
            config.source.databases,
            Databases::List(vec!["a".into(), "b".into()])
        );
        assert_eq!(config.limits.batch_changes, 7);
    }

    #[test]
    fn what_this_version_does_not_do_is_refused() {
        for section in [
            "[route]\nkind = \"kafka\"\n",
            "[route]\nkind = \"kinesis\"\n",
            "[route]\nstream = \"app\"\n",
            "[archive]\nrequired = true\n",
            "[archive]\nurl = \"ftp://x\"\n",
            "[archive]\nurl = \"file:///x\"\nencryption = \"sse-s3\"\n",
            "[archive]\nurl = \"s3://b/p\"\nencryption = \"sse-kms\"\n",
            "[archive]\nurl = \"s3://b/p\"\nkms_key = \"alias/k\"\n",
        ] {
            assert!(parse(&format!("{LEAST}{section}")).is_err(), "{section}");
        }
    }

    #[test]
    fn sizes_and_durations_have_units() {
        assert!(parse(&format!("{LEAST}[objectives]\nrpo = \"30\"\n")).is_err());
        assert!(parse(&format!("{LEAST}[limits]\nbatch_bytes = \"0\"\n")).is_err());
        assert!(parse(&format!("{LEAST}[limits]\nqueue_bytes = \"1MiB\"\n")).is_ok());
    }

    const EXAMPLE: &str = include_str!("../../../ops/dr-agent.toml");

    /// The example with every `#key = value` and `#[section]` line put into effect. Prose has a space
    /// after the number sign.
    fn example_in_full() -> String {
        let put_into_effect = |line: &'static str| match line.strip_prefix('#') {
            Some(rest) if !rest.is_empty() && !rest.starts_with(' ') => rest,
            _ => line,
        };
        EXAMPLE
            .lines()
            .map(put_into_effect)
            .collect::<Vec<_>>()
            .join("\n")
    }

    #[test]
    fn the_example_shows_the_true_defaults() {
        let short = parse(EXAMPLE).unwrap();
        let mut full = parse(&example_in_full()).unwrap();
        assert_eq!(full.hooks.len(), 2);
        // These have no default; the example says so.
        full.hooks.clear();
        full.copy.pg_bin = None;
        let least = "[archive]\nurl = \"s3://bucket/prefix\"\nencryption = \"sse-kms\"\nkms_key = \"alias/dr-agent\"\n";
        let archive = parse(&format!("{LEAST}{least}")).unwrap().archive;
        assert_eq!(format!("{:?}", full.archive.take()), format!("{archive:?}"));
        full.source.conninfo = short.source.conninfo.clone();
        full.replica.conninfo = short.replica.conninfo.clone();
        assert_eq!(format!("{full:?}"), format!("{short:?}"));
        let hook = parse(&example_in_full()).unwrap().hooks.remove(0);
        assert_eq!(hook.on_failure, OnFailure::default());
    }

    /// The keys a section knows, from the parser's own complaint about one it does not know.
    fn known_keys(header: &str) -> Vec<String> {
        let error = parse(&format!("{header}\nno_such_key = 1\n"))
            .unwrap_err()
            .to_string();
        let (_, listed) = error
            .split_once("expected")
            .expect("the complaint lists the keys");
        // Every second piece stands between backquotes.
        listed
            .split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn the_example_shows_every_key() {
        let full: toml::Table = example_in_full().parse().unwrap();
        let sections = known_keys("");
        assert!(sections.len() > 5, "{sections:?}");
        for section in &sections {
            let shown = full[section].as_table().unwrap();
            for key in known_keys(&format!("[{section}]")) {
                // Has no meaning under the default route; the text above it shows it.
                if (section.as_str(), key.as_str()) != ("route", "stream") {
                    assert!(shown.contains_key(&key), "{section}.{key} is not shown");
                }
            }
        }
        let hook = full["promote"]["hook"][0].as_table().unwrap();
        for key in known_keys("[[promote.hook]]") {
            assert!(hook.contains_key(&key), "promote.hook.{key} is not shown");
        }
    }

    #[test]
    fn patterns_match_whole_names() {
        let pattern = TablePattern::parse("public.scratch_*").unwrap();
        assert!(pattern.matches("public", "scratch_1"));
        assert!(!pattern.matches("public", "my_scratch_1"));
        assert!(TablePattern::parse("scratch").is_err());
        assert!(
            TablePattern::parse("*.log")
                .unwrap()
                .matches("audit", "log")
        );
    }
}
