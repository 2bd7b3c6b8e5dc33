//! The configuration file of an agent under test.
//!
//! Two URLs are enough; everything else has values that make tests quick (a heartbeat five times
//! a second, short retries) and can be set as in the file: `.set("limits.batch_changes", "7")`.

use std::collections::BTreeMap;
use std::path::Path;

use dr_agent::names::stream::StreamName;

use crate::binaries::Binaries;

/// Keys and their values as TOML, and what the tests need to know about them.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    keys: BTreeMap<String, String>,
    slot: String,
}

impl AgentConfig {
    /// A configuration for two URLs.
    pub fn new(source_url: &str, replica_url: &str) -> Self {
        let pg_bin = Binaries::newest_of_both().directory;
        let new = Self {
            keys: BTreeMap::new(),
            slot: "dr_agent".to_owned(),
        };
        new.set("source.url", &quote(source_url))
            .set("source.heartbeat", "\"200ms\"")
            .set("source.sequences", "\"300ms\"")
            // Most tests are about what stands when DDL was run on one side only; those of `ddl` say otherwise.
            .set_text(
                "source.ddl",
                &std::env::var("DR_AGENT_TEST_DDL").unwrap_or_else(|_| "off".to_owned()),
            )
            .set("replica.url", &quote(replica_url))
            .set("limits.retry_max", "\"1s\"")
            .set("copy.pg_bin", &quote(&pg_bin.display().to_string()))
    }

    /// The databases to replicate.
    #[must_use]
    pub fn databases(self, names: &[&str]) -> Self {
        let list: Vec<String> = names.iter().map(|name| quote(name)).collect();
        self.set("source.databases", &format!("[{}]", list.join(", ")))
    }

    /// What slots and publications are named after.
    #[must_use]
    pub fn slot(mut self, name: &str) -> Self {
        name.clone_into(&mut self.slot);
        self.set("source.slot", &quote(name))
    }

    /// Sets `section.key` to a value written as TOML.
    #[must_use]
    pub fn set(mut self, key: &str, value: &str) -> Self {
        self.keys.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Sets `section.key` to a string.
    #[must_use]
    pub fn set_text(self, key: &str, value: &str) -> Self {
        self.set(key, &quote(value))
    }

    /// The slot, publication and progress row of a database.
    pub fn stream(&self, database: &str) -> StreamName {
        StreamName::new(&self.slot, database)
    }

    /// The text of the file.
    pub(crate) fn to_toml(&self, http_port: u16, spill: &Path) -> String {
        let mut keys = self.keys.clone();
        keys.entry("http.listen".to_owned())
            .or_insert_with(|| quote(&format!("127.0.0.1:{http_port}")));
        keys.entry("limits.spill_directory".to_owned())
            .or_insert_with(|| quote(&spill.display().to_string()));
        let mut text = String::new();
        let mut section = "";
        // Sorted by key, so each section comes once.
        for (key, value) in &keys {
            let (of, name) = key.split_once('.').expect("a key is section.key");
            if of != section {
                text.push_str(&format!("[{of}]\n"));
                section = of;
            }
            text.push_str(&format!("{name} = {value}\n"));
        }
        text
    }
}

fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_one_the_agent_accepts() {
        let config = AgentConfig::new("postgres://a@127.0.0.1:1/x", "postgres://b@127.0.0.1:2/y")
            .databases(&["app", "Größe"])
            .slot("mine")
            .set("limits.batch_changes", "7");
        let text = config.to_toml(9717, Path::new("/tmp/spill"));
        let parsed = dr_agent::config::Config::parse("test", &text, []).unwrap();
        assert_eq!(parsed.limits.batch_changes, 7);
        assert_eq!(parsed.stream("app"), config.stream("app"));
    }
}
