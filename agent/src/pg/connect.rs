//! Placeholder; replaced by the connection work.
use super::{ConnInfo, PgError};
use tokio_postgres::{Client, NoTls};

/// What a session is for: its `application_name` and the settings it starts with.
#[derive(Clone, Debug)]
pub struct Session {
    /// `application_name`, see [`crate::stream::StreamName::application_name`].
    pub application_name: String,
    /// Settings sent with the start-up packet, as `-c name=value`.
    pub settings: Vec<(&'static str, String)>,
}

impl Session {
    /// A session without settings of its own.
    pub fn new(application_name: impl Into<String>) -> Self {
        Self {
            application_name: application_name.into(),
            settings: Vec::new(),
        }
    }

    /// Adds a setting.
    #[must_use]
    pub fn set(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.settings.push((name, value.into()));
        self
    }
}

/// Opens an ordinary session; the connection is driven by a task of its own and closes when the
/// client is dropped.
pub async fn connect(conninfo: &ConnInfo, session: &Session) -> Result<Client, PgError> {
    let mut config = conninfo.config.clone();
    config.application_name(&session.application_name);
    let options: Vec<String> = session
        .settings
        .iter()
        .map(|(name, value)| format!("-c {name}={value}"))
        .collect();
    if !options.is_empty() {
        config.options(options.join(" "));
    }
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}
