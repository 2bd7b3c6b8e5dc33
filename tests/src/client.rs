//! An SQL session for tests: statements either work or the test fails and says which one did not.
//!
//! Everything goes through the simple query protocol as text, so a test reads like `psql` and no
//! value is converted on the way.
//!
//! # What it does not do
//! It is not the agent's own client (`dr_agent::pg`): what is under test does not check itself.

use std::error::Error as _;

use tokio_postgres::{NoTls, SimpleQueryMessage};

/// One session.
pub struct Client {
    inner: tokio_postgres::Client,
}

/// A row as text; `None` is NULL.
pub type Row = Vec<Option<String>>;

impl Client {
    /// Connects or fails the test.
    pub async fn connect(url: &str) -> Self {
        Self::try_connect(url)
            .await
            .unwrap_or_else(|error| panic!("cannot connect to {url}: {error}"))
    }

    /// Connects; the error is text.
    pub async fn try_connect(url: &str) -> Result<Self, String> {
        let (inner, connection) = tokio_postgres::connect(url, NoTls).await.map_err(text_of)?;
        // Ends when the client is dropped.
        tokio::spawn(connection);
        Ok(Self { inner })
    }

    /// Runs statements; several, separated by semicolons, are one transaction.
    pub async fn run(&self, sql: &str) {
        if let Err(error) = self.try_run(sql).await {
            panic!("{error}\nwhile running: {}", shortened(sql));
        }
    }

    /// Runs statements; the error is `SQLSTATE message`.
    pub async fn try_run(&self, sql: &str) -> Result<(), String> {
        self.inner.batch_execute(sql).await.map_err(text_of)
    }

    /// All rows of a query.
    pub async fn rows(&self, sql: &str) -> Vec<Row> {
        match self.try_rows(sql).await {
            Ok(rows) => rows,
            Err(error) => panic!("{error}\nwhile running: {}", shortened(sql)),
        }
    }

    /// All rows of a query; the error is `SQLSTATE message`.
    pub async fn try_rows(&self, sql: &str) -> Result<Vec<Row>, String> {
        let messages = self.inner.simple_query(sql).await.map_err(text_of)?;
        let rows = messages.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(
                (0..row.len())
                    .map(|column| row.get(column).map(str::to_owned))
                    .collect(),
            ),
            _ => None,
        });
        Ok(rows.collect())
    }

    /// The first column of the first row; `None` for NULL or no row.
    pub async fn value(&self, sql: &str) -> Option<String> {
        let rows = self.rows(sql).await;
        rows.into_iter().next()?.into_iter().next()?
    }

    /// The first column of the first row, which must be a number.
    pub async fn number(&self, sql: &str) -> i64 {
        let value = self.value(sql).await;
        value
            .as_deref()
            .and_then(|text| text.parse().ok())
            .unwrap_or_else(|| panic!("{sql} gave {value:?}, not a number"))
    }

    /// Whether the query gave `t`.
    pub async fn holds(&self, sql: &str) -> bool {
        self.value(sql).await.as_deref() == Some("t")
    }

    /// The first column of every row.
    pub async fn column(&self, sql: &str) -> Vec<String> {
        let rows = self.rows(sql).await;
        rows.into_iter()
            .filter_map(|row| row.into_iter().next().flatten())
            .collect()
    }

    /// The driver's client, for COPY and the like.
    pub fn driver(&self) -> &tokio_postgres::Client {
        &self.inner
    }
}

fn text_of(error: tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => {
            let detail = db.detail().unwrap_or_default();
            format!("{} {} {detail}", db.code().code(), db.message())
        }
        None => match error.source() {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        },
    }
}

fn shortened(sql: &str) -> String {
    const LENGTH_MAX: usize = 2000;
    if sql.chars().count() <= LENGTH_MAX {
        return sql.to_owned();
    }
    let start: String = sql.chars().take(LENGTH_MAX).collect();
    format!("{start} …")
}
