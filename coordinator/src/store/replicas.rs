//! Which nodes are online, and which coordinator says so.
//!
//! Each coordinator process is a replica with a lease. It marks the nodes whose streams it holds;
//! when its lease runs out, another one unmarks them.

use super::{NetworkRow, StoreError, Timestamp, Tx};
use proto::id::{NetworkId, NodeId};

impl Tx {
    /// Extends a replica's lease.
    ///
    /// # Errors
    /// The database's.
    pub async fn renew_lease(&mut self, replica: &str, until: Timestamp) -> Result<(), StoreError> {
        self.execute(
            "INSERT INTO replicas (id, alive_until) VALUES ($1, $2) \
             ON CONFLICT (id) DO UPDATE SET alive_until = excluded.alive_until",
            &[replica.into(), until.into()],
        )
        .await?;
        Ok(())
    }

    /// Forgets replicas whose lease is over and that hold no node any more.
    ///
    /// # Errors
    /// The database's.
    pub async fn forget_replicas(&mut self, now: Timestamp) -> Result<(), StoreError> {
        let sql = "DELETE FROM replicas WHERE alive_until < $1 \
                   AND id NOT IN (SELECT online_by FROM nodes WHERE online_by IS NOT NULL)";
        self.execute(sql, &[now.into()]).await?;
        Ok(())
    }

    /// Notes that `replica` holds the node's stream. Whether that is news to its peers: `true`
    /// if the node was offline.
    ///
    /// # Errors
    /// The database's.
    pub async fn set_online(
        &mut self,
        network: &NetworkRow,
        node: NodeId,
        replica: &str,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let sql = "UPDATE nodes SET online_by = $3, last_seen = $4, changed = $5 \
                   WHERE network = $1 AND id = $2 AND online_by IS NULL";
        let values = [
            network.id.into(),
            node.into(),
            replica.into(),
            now.into(),
            network.generation.into(),
        ];
        if self.execute(sql, &values).await? == 1 {
            return Ok(true);
        }
        let sql = "UPDATE nodes SET online_by = $3 WHERE network = $1 AND id = $2";
        self.execute(sql, &[network.id.into(), node.into(), replica.into()])
            .await?;
        Ok(false)
    }

    /// Notes that `replica` lost the node's stream. `true` if that is news: no other replica took
    /// the node over meanwhile.
    ///
    /// # Errors
    /// The database's.
    pub async fn set_offline(
        &mut self,
        network: &NetworkRow,
        node: NodeId,
        replica: &str,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let sql = "UPDATE nodes SET online_by = NULL, last_seen = $4, changed = $5 \
                   WHERE network = $1 AND id = $2 AND online_by = $3";
        let values = [
            network.id.into(),
            node.into(),
            replica.into(),
            now.into(),
            network.generation.into(),
        ];
        Ok(self.execute(sql, &values).await? == 1)
    }

    /// Nodes whose replica's lease is over.
    ///
    /// # Errors
    /// The database's.
    pub async fn orphans(
        &mut self,
        now: Timestamp,
    ) -> Result<Vec<(NetworkId, NodeId, String)>, StoreError> {
        let sql = "SELECT network, id, online_by FROM nodes WHERE online_by IS NOT NULL \
                   AND online_by NOT IN (SELECT id FROM replicas WHERE alive_until >= $1) \
                   ORDER BY network, id";
        let rows = self.rows(sql, &[now.into()]).await?;
        rows.iter()
            .map(|row| {
                let (network, node) = (row.unsigned("network")?, row.unsigned("id")?);
                Ok((NetworkId(network), NodeId(node), row.text("online_by")?))
            })
            .collect()
    }

    /// Ephemeral nodes that have been offline since before `since`.
    ///
    /// # Errors
    /// The database's.
    pub async fn expired_ephemerals(
        &mut self,
        since: Timestamp,
    ) -> Result<Vec<(NetworkId, NodeId)>, StoreError> {
        let sql = "SELECT network, id FROM nodes WHERE ephemeral = 1 AND online_by IS NULL \
                   AND last_seen < $1 ORDER BY network, id";
        let rows = self.rows(sql, &[since.into()]).await?;
        rows.iter()
            .map(|row| {
                Ok((
                    NetworkId(row.unsigned("network")?),
                    NodeId(row.unsigned("id")?),
                ))
            })
            .collect()
    }
}
