//! The same connection settings for libpq's own programs (`pg_dump`, `pg_restore`).
//!
//! They go through the environment and not the command line: a process list shows arguments to
//! everybody, the environment only to the same user.

use std::path::Path;

use super::ConnInfo;
use crate::pg::{password, tls};

impl ConnInfo {
    /// Environment for libpq programs: `PGHOST`, `PGPORT`, `PGUSER`, `PGDATABASE`, `PGPASSWORD`,
    /// `PGSSLMODE` and so on.
    ///
    /// Where our password comes from `PGPASSWORD` or a password file of libpq's, the program finds it
    /// by itself. A `password_file` that cannot be read leaves `PGPASSWORD` out, with a warning: our
    /// own sessions fail on it with an error.
    pub fn libpq_environment(&self) -> Vec<(String, String)> {
        let list = |item: &dyn Fn(&super::Host) -> String| {
            self.hosts.iter().map(item).collect::<Vec<_>>().join(",")
        };
        let mut environment = vec![
            ("PGHOST", list(&|host| host.name.clone())),
            ("PGPORT", list(&|host| host.port.to_string())),
            ("PGUSER", self.user.clone()),
            ("PGDATABASE", self.dbname.clone()),
            ("PGSSLMODE", self.ssl_mode.as_str().to_owned()),
            ("PGCHANNELBINDING", self.channel_binding.as_str().to_owned()),
            (
                "PGTARGETSESSIONATTRS",
                self.target_session_attrs.as_str().to_owned(),
            ),
        ];
        if self.hosts.iter().any(|host| host.addr.is_some()) {
            let addresses = list(&|host| host.addr.map(|a| a.to_string()).unwrap_or_default());
            environment.push(("PGHOSTADDR", addresses));
        }
        match password::configured(self) {
            Ok(Some(password)) => environment.push(("PGPASSWORD", password)),
            Ok(None) => {}
            Err(reason) => {
                tracing::warn!(server = %self, %reason, "no password for libpq programs");
            }
        }
        let mut path = |name, path: Option<&Path>| {
            if let Some(path) = path {
                environment.push((name, path.to_string_lossy().into_owned()));
            }
        };
        path("PGPASSFILE", self.passfile.as_deref());
        // libpq before 16 does not know the word `system`; the file behind it serves all versions.
        path(
            "PGSSLROOTCERT",
            match self.ssl_root_cert.as_deref() {
                Some(word) if word == Path::new("system") => tls::system_roots(),
                file => file,
            },
        );
        path("PGSSLCERT", self.ssl_cert.as_deref());
        path("PGSSLKEY", self.ssl_key.as_deref());
        if self.ssl_direct {
            environment.push(("PGSSLNEGOTIATION", "direct".to_owned()));
        }
        let timeout = self.connect_timeout.map_or(0, |limit| limit.as_secs());
        environment.push(("PGCONNECT_TIMEOUT", timeout.to_string()));
        if let Some(options) = &self.options {
            environment.push(("PGOPTIONS", options.clone()));
        }
        environment
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }
}

impl ConnInfo {
    /// The same as one connection string, without a password: for a script that a person runs with `psql`.
    pub fn without_password(&self) -> String {
        const KEYWORDS: [(&str, &str); 11] = [
            ("PGHOST", "host"),
            ("PGHOSTADDR", "hostaddr"),
            ("PGPORT", "port"),
            ("PGUSER", "user"),
            ("PGDATABASE", "dbname"),
            ("PGSSLMODE", "sslmode"),
            ("PGTARGETSESSIONATTRS", "target_session_attrs"),
            ("PGPASSFILE", "passfile"),
            ("PGSSLROOTCERT", "sslrootcert"),
            ("PGSSLCERT", "sslcert"),
            ("PGSSLKEY", "sslkey"),
        ];
        let environment = self.libpq_environment();
        let pair = |(name, keyword): &(&str, &str)| {
            let (_, value) = environment.iter().find(|(there, _)| there == name)?;
            let value = value.replace('\\', "\\\\").replace('\'', "\\'");
            Some(format!("{keyword}='{value}'"))
        };
        KEYWORDS
            .iter()
            .filter_map(pair)
            .collect::<Vec<_>>()
            .join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::ConnInfo;

    #[test]
    fn libpq_programs_get_the_same_settings() {
        let info = ConnInfo::parse(
            "postgres://u:p@h1:1,h2:2/d?sslmode=verify-ca&sslrootcert=/ca&connect_timeout=4",
            None,
        )
        .unwrap();
        let environment = info.libpq_environment();
        let value = |name: &str| {
            let found = environment.iter().find(|(key, _)| key == name);
            found.map(|(_, value)| value.as_str())
        };
        assert_eq!(value("PGHOST"), Some("h1,h2"));
        assert_eq!(value("PGPORT"), Some("1,2"));
        assert_eq!(value("PGUSER"), Some("u"));
        assert_eq!(value("PGDATABASE"), Some("d"));
        assert_eq!(value("PGPASSWORD"), Some("p"));
        assert_eq!(value("PGSSLMODE"), Some("verify-ca"));
        assert_eq!(value("PGSSLROOTCERT"), Some("/ca"));
        assert_eq!(value("PGCONNECT_TIMEOUT"), Some("4"));
        assert_eq!(value("PGHOSTADDR"), None);
    }
}
