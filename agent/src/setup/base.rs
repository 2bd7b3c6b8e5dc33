//! Route `kinesis`, where the sites do not see one another: the replica's first rows come out of the archive's newest base
//! backup.
//!
//! # Invariants
//! - The stream's row is there before the first object is created, the progress row after the last: a load that was killed in
//!   between is recognized, and what it left is removed before the next.
//!
//! # What it does not do
//! It creates no roles: `roles.sql.zst` of the base backup is for a person.

use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::begin::First;
use super::error::{SetupError, Side};
use crate::archive::base::{self, BackupError, LoadJob, Manifest, Newest, Ownership};
use crate::cloud::store::Store;
use crate::config::{Archive, Config};
use crate::copy::CopyObserver;
use crate::names::TableName;
use crate::names::history::Cluster;
use crate::names::stream::StreamName;
use crate::pg::{ConnInfo, PgError, PgLsn};
use crate::schema::progress::{self, Progress};
use crate::schema::stream::Recorded;
use crate::schema::{schema_sync, table_sync};

/// The archive of a stream, for whoever asks again and again what its newest base backup has.
#[derive(Debug, Default)]
pub struct Watch {
    store: Option<Store>,
    newest: Newest,
}

impl Watch {
    /// The tables whose rows it holds; none before the first was taken.
    pub(super) async fn tables(
        &mut self,
        archive: &Archive,
        stream: &StreamName,
        database: &str,
    ) -> Result<Vec<TableName>, SetupError> {
        let found = self.find(archive, stream).await;
        let (_, found) = found.map_err(|source| in_archive(source, database))?;
        let tables = found.map(|(_, manifest)| manifest.tables());
        Ok(tables.unwrap_or_default())
    }

    async fn find(
        &mut self,
        archive: &Archive,
        stream: &StreamName,
    ) -> Result<(&Store, Option<(&str, &Manifest)>), BackupError> {
        let store = match &mut self.store {
            Some(store) => store,
            // Whoever comes before `run` has made the directory finds an archive without a base.
            none => none.insert(Store::open(&archive.url, &archive.encryption).await?),
        };
        let found = self.newest.find(store, stream).await?;
        Ok((store, found))
    }
}

fn in_archive(source: BackupError, database: &str) -> SetupError {
    SetupError::Base {
        database: database.to_owned(),
        source: Box::new(source),
    }
}

/// The newest base backup of a stream.
pub(super) struct Base {
    store: Store,
    prefix: String,
    pub(super) manifest: Manifest,
}

/// Finds it; none before the first was taken.
pub(super) async fn newest(
    archive: &Archive,
    stream: &StreamName,
    database: &str,
) -> Result<Option<Base>, SetupError> {
    let mut watch = Watch::default();
    let found = watch.find(archive, stream).await;
    let (store, found) = found.map_err(|source| in_archive(source, database))?;
    Ok(found.map(|(prefix, manifest)| Base {
        store: store.clone(),
        prefix: prefix.to_owned(),
        manifest: manifest.clone(),
    }))
}

impl Base {
    /// The source it was taken from.
    pub(super) fn recorded(&self) -> Recorded {
        Recorded {
            cluster: Cluster {
                system_identifier: self.manifest.system_identifier,
                timeline: self.manifest.timeline,
            },
            began: self.manifest.history().began,
        }
    }

    /// Loads it into the replica's database; what an interrupted load left there is removed.
    pub(super) async fn load(
        &self,
        config: &Config,
        (stream, target): (&StreamName, &ConnInfo),
        client: &mut Client,
        first: &mut First,
        (observer, cancel): (&dyn CopyObserver, &CancellationToken),
    ) -> Result<Progress, SetupError> {
        let database = target.dbname();
        let job = LoadJob {
            store: &self.store,
            base: &self.prefix,
            manifest: &self.manifest,
            target,
            stream,
            settings: &config.copy,
            only: None,
            ownership: Ownership::IfPossible,
            views: true,
        };
        let examined = base::examine(&job, client).await;
        let examined = examined.map_err(|source| in_archive(source, database))?;
        first
            .take(client, (database, stream), &self.recorded())
            .await?;
        first.begun();
        if first.is_interrupted() {
            tracing::info!(database, "an earlier load was interrupted: begins anew");
            base::wipe(client).await.map_err(SetupError::sql(
                Side::Replica,
                "remove what an interrupted load left",
            ))?;
        }
        base::load(job, examined, observer, cancel)
            .await
            .map_err(|source| in_archive(source, database))?;
        self.loaded(client, stream)
            .await
            .map_err(SetupError::sql(Side::Replica, "record the base backup"))
    }

    async fn loaded(&self, client: &mut Client, stream: &StreamName) -> Result<Progress, PgError> {
        let lsn: PgLsn = self.manifest.lsn;
        let (tables, listed) = (self.manifest.tables(), self.manifest.listed());
        let transaction = client.transaction().await?;
        let tables = tables.iter().map(|table| (table, listed.get(table)));
        table_sync::add_ready(&transaction, stream, tables, lsn).await?;
        schema_sync::note(&transaction, stream).await?;
        let committed = Some(self.manifest.as_of.into());
        let progress = progress::begin(&transaction, stream, 1, (lsn, committed)).await?;
        transaction.commit().await?;
        Ok(progress)
    }
}
