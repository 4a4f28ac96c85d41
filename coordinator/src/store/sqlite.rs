//! SQLite, the database in the state folder: one file, one process, many readers, one writer.

use super::{StoreError, Value, WAIT};
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::query::Query;
use sqlx::sqlite::{
    SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions,
    SqliteSynchronous,
};
use sqlx::{SqlStr, Sqlite};
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Takes the write lock at once: a read lock that is upgraded later can fail half-way.
pub(super) const BEGIN_WRITE: &str = "BEGIN IMMEDIATE";
const MAX_CONNECTIONS: u32 = 8;

const MIGRATIONS: [(i64, &str, &str); 2] = [
    (
        1,
        "initial",
        include_str!("../../migrations/sqlite/0001_initial.sql"),
    ),
    (
        2,
        "relays",
        include_str!("../../migrations/sqlite/0002_relays.sql"),
    ),
];

pub(super) async fn open(path: &Path) -> Result<SqlitePool, StoreError> {
    // SQLite gives its journals the mode of the database.
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .map_err(sqlx::Error::Io)?;
    let options = SqliteConnectOptions::new()
        .filename(path)
        .foreign_keys(true)
        .journal_mode(SqliteJournalMode::Wal)
        // A commit that was reported survives a power cut.
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(WAIT);
    let pool = SqlitePoolOptions::new()
        .max_connections(MAX_CONNECTIONS)
        .acquire_timeout(WAIT)
        .connect_with(options)
        .await?;
    migrator(&MIGRATIONS).run(&pool).await?;
    Ok(pool)
}

pub(super) fn migrator(list: &[(i64, &'static str, &'static str)]) -> Migrator {
    let migration = |&(version, name, sql): &(i64, &'static str, &'static str)| {
        let sql = SqlStr::from_static(sql);
        Migration::new(version, name.into(), MigrationType::Simple, sql, false)
    };
    Migrator::with_migrations(list.iter().map(migration).collect())
}

pub(super) fn bind(sql: &'static str, values: &[Value]) -> Query<'static, Sqlite, SqliteArguments> {
    values
        .iter()
        .fold(sqlx::query(sql), |query, value| match value {
            Value::Int(value) => query.bind(*value),
            Value::Text(value) => query.bind(value.clone()),
            Value::Bytes(value) => query.bind(value.clone()),
        })
}
