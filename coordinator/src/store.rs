//! What the coordinator remembers, on SQLite or on Postgres.
//!
//! A [`Store`] gives transactions; the domain verbs are methods of [`Tx`], one file a subject
//! (`networks`, `nodes`, `tokens`, `audit`). Every statement is written once and runs on both
//! databases: the two files that know a driver (`sqlite`, `postgres`) only connect, begin, bind
//! and notify. Writers of one network take turns, because each of them first raises that
//! network's generation ([`Tx::raise`]), which locks its row.
//!
//! After a commit the store says which networks changed ([`Store::changes`]), on Postgres in every
//! replica. Whoever misses a message reads the generation and sees it: the database is the only
//! truth.

mod audit;
mod networks;
mod nodes;
mod permits;
mod postgres;
mod replicas;
mod sqlite;
mod tokens;

pub use audit::{AuditEntry, AuditRow, Chain};
pub use networks::{NetworkRow, NewNetwork, Rows};
pub use nodes::NodeRow;
pub use tokens::{TokenHash, TokenRow, TokenState};

use proto::id::{Generation, NetworkId, RegionId};
use proto::key::DiscoKey;
use serde::{Deserialize, Serialize};
use sqlx::Row as _;
use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};
use tokio::sync::broadcast;

/// Longest wait for a connection of the pool or for SQLite's write lock.
const WAIT: Duration = Duration::from_secs(5);
/// Change messages kept for a slow listener; one that falls behind looks at every network.
const MAX_QUEUED_CHANGES: usize = 1_024;

/// Milliseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// The wall clock. Called at the edges only; commands take the time as an argument.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self(since.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX)))
    }

    /// This instant and `duration` more.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        let more = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        Self(self.0.saturating_add(more))
    }

    /// Whole seconds since 1970.
    #[must_use]
    pub fn seconds(self) -> u64 {
        u64::try_from(self.0 / 1_000).unwrap_or(0)
    }

    /// This instant less `duration`.
    #[must_use]
    pub fn before(self, duration: Duration) -> Self {
        let less = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        Self(self.0.saturating_sub(less))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = u64::try_from(self.0).unwrap_or(0);
        let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(millis));
        match time {
            // 9999 is where the text form ends.
            Some(time) if millis < 253_402_300_799_000 => {
                humantime::format_rfc3339_seconds(time).fmt(f)
            }
            Some(_) | None => f.write_str("never"),
        }
    }
}

/// Why the store could not do it. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database did not answer, or refused.
    #[error("the database does not answer")]
    Database(#[from] sqlx::Error),
    /// The database has another schema than this program.
    #[error("the database's tables could not be brought up to date")]
    Migration(#[from] sqlx::migrate::MigrateError),
    /// A row holds what this program never wrote.
    #[error("the database holds a value that cannot be read, in column `{column}`")]
    Corrupt {
        /// The column.
        column: &'static str,
    },
    /// The URL is of no database that this program knows.
    #[error("write the database as `sqlite:PATH` or `postgres://USER@HOST/NAME`")]
    Url,
}

impl StoreError {
    /// Whether the change broke a uniqueness rule of the schema.
    #[must_use]
    pub fn is_duplicate(&self) -> bool {
        match self {
            Self::Database(sqlx::Error::Database(error)) => error.is_unique_violation(),
            Self::Database(_) | Self::Migration(_) | Self::Corrupt { .. } | Self::Url => false,
        }
    }
}

/// What [`Store::changes`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// This network changed.
    Network(NetworkId),
    /// Messages may be lost: look at every network.
    Unknown,
}

/// A database with our tables in it.
#[derive(Clone)]
pub struct Store {
    backend: Backend,
    changes: broadcast::Sender<Changed>,
}

#[derive(Clone)]
enum Backend {
    Sqlite(sqlx::SqlitePool),
    Postgres(sqlx::PgPool),
}

/// A transaction. Dropped without [`Tx::commit`], it changes nothing.
pub struct Tx {
    connection: Connection,
    changed: Vec<NetworkId>,
    changes: broadcast::Sender<Changed>,
}

enum Connection {
    Sqlite(sqlx::Transaction<'static, sqlx::Sqlite>),
    Postgres(sqlx::Transaction<'static, sqlx::Postgres>),
}

impl Store {
    /// The SQLite database in this file, made if absent.
    ///
    /// # Errors
    /// If the file cannot be opened or has tables of another version.
    pub async fn open_sqlite(path: &Path) -> Result<Self, StoreError> {
        let backend = Backend::Sqlite(sqlite::open(path).await?);
        let (changes, _) = broadcast::channel(MAX_QUEUED_CHANGES);
        Ok(Self { backend, changes })
    }

    /// The database at `url`: `sqlite:PATH` or `postgres://…`.
    ///
    /// # Errors
    /// If the URL is of neither kind, or the database cannot be reached or brought up to date.
    pub async fn open_url(url: &str) -> Result<Self, StoreError> {
        if let Some(path) = url.strip_prefix("sqlite:") {
            return Self::open_sqlite(Path::new(path.trim_start_matches("//"))).await;
        }
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err(StoreError::Url);
        }
        let (changes, _) = broadcast::channel(MAX_QUEUED_CHANGES);
        let pool = postgres::open(url).await?;
        postgres::listen(&pool, changes.clone()).await?;
        let backend = Backend::Postgres(pool);
        Ok(Self { backend, changes })
    }

    /// A transaction that sees one state of the database and changes nothing.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn read(&self) -> Result<Tx, StoreError> {
        let connection = match &self.backend {
            Backend::Sqlite(pool) => Connection::Sqlite(pool.begin().await?),
            Backend::Postgres(pool) => {
                Connection::Postgres(pool.begin_with(postgres::BEGIN_READ).await?)
            }
        };
        Ok(self.transaction(connection))
    }

    /// A transaction that may change things.
    ///
    /// # Errors
    /// If the database does not answer, or SQLite's write lock stays taken.
    pub async fn write(&self) -> Result<Tx, StoreError> {
        let connection = match &self.backend {
            Backend::Sqlite(pool) => {
                Connection::Sqlite(pool.begin_with(sqlite::BEGIN_WRITE).await?)
            }
            Backend::Postgres(pool) => Connection::Postgres(pool.begin().await?),
        };
        Ok(self.transaction(connection))
    }

    fn transaction(&self, connection: Connection) -> Tx {
        let changes = self.changes.clone();
        Tx {
            connection,
            changed: Vec::new(),
            changes,
        }
    }

    /// The networks that commits change from now on, here and in every replica.
    #[must_use]
    pub fn changes(&self) -> broadcast::Receiver<Changed> {
        self.changes.subscribe()
    }

    /// Closes every connection.
    pub async fn close(&self) {
        match &self.backend {
            Backend::Sqlite(pool) => pool.close().await,
            Backend::Postgres(pool) => pool.close().await,
        }
    }
}

impl Tx {
    /// Makes the changes true and tells every replica which networks they touch.
    ///
    /// # Errors
    /// If the database does not confirm; nothing is then known to have changed.
    pub async fn commit(mut self) -> Result<(), StoreError> {
        for network in &self.changed {
            if let Connection::Postgres(tx) = &mut self.connection {
                postgres::notify(tx, *network).await?;
            }
        }
        match self.connection {
            Connection::Sqlite(tx) => tx.commit().await?,
            Connection::Postgres(tx) => tx.commit().await?,
        }
        for network in self.changed {
            // An error means that nobody listens, which is fine.
            let _ = self.changes.send(Changed::Network(network));
        }
        Ok(())
    }

    /// Runs a statement; the number of rows that it changed.
    async fn execute(&mut self, sql: &'static str, values: &[Value]) -> Result<u64, StoreError> {
        Ok(match &mut self.connection {
            Connection::Sqlite(tx) => {
                let done = sqlite::bind(sql, values).execute(&mut **tx).await?;
                done.rows_affected()
            }
            Connection::Postgres(tx) => {
                let done = postgres::bind(sql, values).execute(&mut **tx).await?;
                done.rows_affected()
            }
        })
    }

    /// Runs a statement; the rows that it gives.
    async fn rows(&mut self, sql: &'static str, values: &[Value]) -> Result<Vec<Row>, StoreError> {
        Ok(match &mut self.connection {
            Connection::Sqlite(tx) => {
                let rows = sqlite::bind(sql, values).fetch_all(&mut **tx).await?;
                rows.into_iter().map(Row::Sqlite).collect()
            }
            Connection::Postgres(tx) => {
                let rows = postgres::bind(sql, values).fetch_all(&mut **tx).await?;
                rows.into_iter().map(Row::Postgres).collect()
            }
        })
    }

    /// Runs a statement that gives one row or none.
    async fn row(
        &mut self,
        sql: &'static str,
        values: &[Value],
    ) -> Result<Option<Row>, StoreError> {
        Ok(self.rows(sql, values).await?.pop())
    }
}

/// What a statement is given. `None` is SQL's NULL, of the right type.
enum Value {
    Int(Option<i64>),
    Text(Option<String>),
    Bytes(Option<Vec<u8>>),
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int(Some(value))
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Int(Some(i64::from(value)))
    }
}

impl From<Timestamp> for Value {
    fn from(value: Timestamp) -> Self {
        Self::Int(Some(value.0))
    }
}

impl From<NetworkId> for Value {
    fn from(value: NetworkId) -> Self {
        Self::Int(Some(value.0.cast_signed()))
    }
}

impl From<proto::id::NodeId> for Value {
    fn from(value: proto::id::NodeId) -> Self {
        Self::Int(Some(value.0.cast_signed()))
    }
}

impl From<Generation> for Value {
    fn from(value: Generation) -> Self {
        Self::Int(Some(value.0.cast_signed()))
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(Some(value.to_owned()))
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Text(Some(value))
    }
}

impl From<Option<String>> for Value {
    fn from(value: Option<String>) -> Self {
        Self::Text(value)
    }
}

impl From<&[u8; 32]> for Value {
    fn from(value: &[u8; 32]) -> Self {
        Self::Bytes(Some(value.to_vec()))
    }
}

impl From<Option<DiscoKey>> for Value {
    fn from(value: Option<DiscoKey>) -> Self {
        Self::Bytes(value.map(|key| key.0.to_vec()))
    }
}

impl From<Option<RegionId>> for Value {
    fn from(value: Option<RegionId>) -> Self {
        Self::Int(value.map(|id| i64::from(id.0)))
    }
}

/// A value that is kept as JSON text.
fn json<T: Serialize>(value: &T) -> Value {
    // Lists of plain values always serialize; an unreadable text would be found on reading.
    Value::from(serde_json::to_string(value).unwrap_or_default())
}

enum Row {
    Sqlite(sqlx::sqlite::SqliteRow),
    Postgres(sqlx::postgres::PgRow),
}

impl Row {
    fn int(&self, column: &'static str) -> Result<i64, StoreError> {
        self.maybe_int(column)?
            .ok_or(StoreError::Corrupt { column })
    }

    fn maybe_int(&self, column: &'static str) -> Result<Option<i64>, StoreError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }

    fn unsigned(&self, column: &'static str) -> Result<u64, StoreError> {
        Ok(self.int(column)?.cast_unsigned())
    }

    fn flag(&self, column: &'static str) -> Result<bool, StoreError> {
        Ok(self.int(column)? != 0)
    }

    fn time(&self, column: &'static str) -> Result<Timestamp, StoreError> {
        Ok(Timestamp(self.int(column)?))
    }

    fn text(&self, column: &'static str) -> Result<String, StoreError> {
        self.maybe_text(column)?
            .ok_or(StoreError::Corrupt { column })
    }

    fn maybe_text(&self, column: &'static str) -> Result<Option<String>, StoreError> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }

    fn bytes(&self, column: &'static str) -> Result<[u8; 32], StoreError> {
        self.maybe_bytes(column)?
            .ok_or(StoreError::Corrupt { column })
    }

    fn maybe_bytes(&self, column: &'static str) -> Result<Option<[u8; 32]>, StoreError> {
        let bytes: Option<Vec<u8>> = match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        };
        bytes
            .map(|bytes| bytes.try_into().map_err(|_| StoreError::Corrupt { column }))
            .transpose()
    }

    fn parsed<T: std::str::FromStr>(&self, column: &'static str) -> Result<T, StoreError> {
        self.text(column)?
            .parse()
            .map_err(|_| StoreError::Corrupt { column })
    }

    fn json<T: for<'de> Deserialize<'de>>(&self, column: &'static str) -> Result<T, StoreError> {
        serde_json::from_str(&self.text(column)?).map_err(|_| StoreError::Corrupt { column })
    }
}
