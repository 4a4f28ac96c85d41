//! Postgres, for more than one coordinator: a commit on one wakes the others by NOTIFY.

use super::{Changed, StoreError, Value, WAIT, sqlite::migrator};
use proto::id::NetworkId;
use sqlx::postgres::{PgArguments, PgListener, PgPool, PgPoolOptions};
use sqlx::query::Query;
use sqlx::{Postgres, Transaction};
use std::time::Duration;
use tokio::sync::broadcast;

/// All statements of a reader see the same commit.
pub(super) const BEGIN_READ: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
const MAX_CONNECTIONS: u32 = 16;
const CHANNEL: &str = "weir_network";
/// Pause before the listener tries a lost database again.
const RETRY: Duration = Duration::from_secs(1);

const MIGRATIONS: [(i64, &str, &str); 2] = [
    (
        1,
        "initial",
        include_str!("../../migrations/postgres/0001_initial.sql"),
    ),
    (
        2,
        "relays",
        include_str!("../../migrations/postgres/0002_relays.sql"),
    ),
];

pub(super) async fn open(url: &str) -> Result<PgPool, StoreError> {
    let pool = PgPoolOptions::new()
        .max_connections(MAX_CONNECTIONS)
        .acquire_timeout(WAIT)
        .connect(url)
        .await?;
    migrator(&MIGRATIONS).run(&pool).await?;
    Ok(pool)
}

pub(super) fn bind(sql: &'static str, values: &[Value]) -> Query<'static, Postgres, PgArguments> {
    values
        .iter()
        .fold(sqlx::query(sql), |query, value| match value {
            Value::Int(value) => query.bind(*value),
            Value::Text(value) => query.bind(value.clone()),
            Value::Bytes(value) => query.bind(value.clone()),
        })
}

/// Part of the transaction: listeners hear it when, and only if, it commits.
pub(super) async fn notify(
    tx: &mut Transaction<'static, Postgres>,
    network: NetworkId,
) -> Result<(), StoreError> {
    let query = sqlx::query("SELECT pg_notify($1, $2)")
        .bind(CHANNEL)
        .bind(network.to_string());
    query.execute(&mut **tx).await?;
    Ok(())
}

/// Passes on what other replicas say, until nobody wants to hear it.
pub(super) async fn listen(
    pool: &PgPool,
    changes: broadcast::Sender<Changed>,
) -> Result<(), StoreError> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen(CHANNEL).await?;
    let pool = pool.clone();
    tokio::spawn(async move {
        while !pool.is_closed() {
            let changed = match listener.try_recv().await {
                Ok(Some(message)) => message
                    .payload()
                    .parse()
                    .map_or(Changed::Unknown, |id| Changed::Network(NetworkId(id))),
                // The connection was lost; the listener makes a new one on the next call.
                Ok(None) => Changed::Unknown,
                Err(error) => {
                    tracing::warn!(%error, "cannot listen for changes of other coordinators");
                    tokio::time::sleep(RETRY).await;
                    Changed::Unknown
                }
            };
            let _ = changes.send(changed);
        }
    });
    Ok(())
}
