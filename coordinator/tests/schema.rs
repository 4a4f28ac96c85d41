//! There is no place for a node's private key: every column is listed here. One holds a secret, the
//! coordinator's own: `permit_signer.seed`.

use crate::postgres::Postgres;
use coordinator::store::Store;
use sqlx::{Connection, Row};

/// Every column of every table. A new one is added here after thinking about what it may hold.
const COLUMNS: &str = "\
audit.action audit.actor audit.after audit.at audit.before audit.hash audit.network audit.number \
audit.previous audit.subject \
networks.audit_count networks.audit_head networks.generation networks.id networks.name \
networks.next_host networks.next_node networks.policy_generation networks.v4 networks.v6 \
nodes.advertised nodes.approved nodes.changed nodes.created nodes.disco nodes.endpoints \
nodes.ephemeral nodes.home nodes.host nodes.id nodes.last_seen nodes.listen_port nodes.machine nodes.name nodes.network \
nodes.node_key nodes.online_by nodes.owner nodes.seen_addr \
permit_signer.created permit_signer.number permit_signer.seed \
policies.network policies.text \
removals.generation removals.network removals.node \
replicas.alive_until replicas.id \
tokens.created tokens.ephemeral tokens.expires tokens.hash tokens.network tokens.owner \
tokens.reusable tokens.uses \
users.created users.login users.network";

fn check(mut columns: Vec<String>) {
    columns.retain(|column| !column.starts_with("_sqlx_migrations."));
    columns.sort();
    assert_eq!(columns.join(" "), COLUMNS);
    for column in columns {
        for word in ["private", "secret", "preshared", "password"] {
            assert!(!column.contains(word), "{column}");
        }
    }
}

#[tokio::test]
async fn no_column_of_sqlite_can_hold_a_private_key() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    Store::open_sqlite(&path).await.unwrap();
    let url = format!("sqlite:{}", path.display());
    let mut raw = sqlx::SqliteConnection::connect(&url).await.unwrap();
    let sql = "SELECT t.name || '.' || c.name FROM sqlite_master t, pragma_table_info(t.name) c \
               WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite_%'";
    let rows = sqlx::query(sql).fetch_all(&mut raw).await.unwrap();
    check(rows.iter().map(|row| row.get(0)).collect());
}

#[tokio::test]
async fn no_column_of_postgres_can_hold_a_private_key() {
    let test = "no_column_of_postgres_can_hold_a_private_key";
    let Some(postgres) = Postgres::start(test) else {
        return;
    };
    Store::open_url(&postgres.url()).await.unwrap();
    let mut raw = sqlx::PgConnection::connect(&postgres.url()).await.unwrap();
    let sql = "SELECT table_name || '.' || column_name FROM information_schema.columns \
               WHERE table_schema = 'public'";
    let rows = sqlx::query(sql).fetch_all(&mut raw).await.unwrap();
    check(rows.iter().map(|row| row.get(0)).collect());
}
