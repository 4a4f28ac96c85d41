//! Nodes: who they are, what they offer, where they are.

use super::{NetworkRow, Row, StoreError, Timestamp, Tx, Value, json};
use proto::id::{Generation, NetworkId, NodeId, RegionId};
use proto::key::{DiscoKey, MachineId, NodeKey};
use proto::net::Prefix;
use proto::netmap::Owner;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

/// A node as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRow {
    /// Its network.
    pub network: NetworkId,
    /// Its id in the network; never given to another.
    pub id: NodeId,
    /// Its name, unique in the network.
    pub name: String,
    /// Who is at the other end of its control connection; unique everywhere.
    pub machine: MachineId,
    /// Its WireGuard public key; unique everywhere.
    pub key: NodeKey,
    /// Its addresses are the network's prefixes plus this number.
    pub host: u64,
    /// Who it belongs to.
    pub owner: Owner,
    /// Whether it is removed some time after it went offline.
    pub ephemeral: bool,
    /// Routes that it offers.
    pub advertised: BTreeSet<Prefix>,
    /// Routes that an administrator let it serve, offered or not.
    pub approved: BTreeSet<Prefix>,
    /// Where it says it can be reached.
    pub endpoints: Vec<SocketAddr>,
    /// Its UDP port of WireGuard.
    pub listen_port: u16,
    /// The address that the coordinator saw last.
    pub seen_addr: Option<IpAddr>,
    /// Whether a replica holds its stream.
    pub online: bool,
    /// When it was last online.
    pub last_seen: Timestamp,
    /// When it joined.
    pub created: Timestamp,
    /// What probes of paths to it are sealed for.
    pub disco: Option<DiscoKey>,
    /// The region whose relay it is connected to.
    pub home: Option<RegionId>,
}

macro_rules! columns {
    () => {
        "network, id, name, machine, node_key, host, owner, ephemeral, advertised, approved, \
         endpoints, listen_port, seen_addr, online_by, last_seen, created, disco, home"
    };
}

fn node(row: &Row) -> Result<NodeRow, StoreError> {
    let seen_addr = match row.maybe_text("seen_addr")? {
        Some(_) => Some(row.parsed("seen_addr")?),
        None => None,
    };
    let column = "listen_port";
    let listen_port =
        u16::try_from(row.int(column)?).map_err(|_| StoreError::Corrupt { column })?;
    let column = "home";
    let region = |id| {
        u16::try_from(id)
            .map(RegionId)
            .map_err(|_| StoreError::Corrupt { column })
    };
    Ok(NodeRow {
        network: NetworkId(row.unsigned("network")?),
        id: NodeId(row.unsigned("id")?),
        name: row.text("name")?,
        machine: MachineId(row.bytes("machine")?),
        key: NodeKey(row.bytes("node_key")?),
        host: row.unsigned("host")?,
        owner: row.json("owner")?,
        ephemeral: row.flag("ephemeral")?,
        advertised: row.json("advertised")?,
        approved: row.json("approved")?,
        endpoints: row.json("endpoints")?,
        listen_port,
        seen_addr,
        online: row.maybe_text("online_by")?.is_some(),
        last_seen: row.time("last_seen")?,
        created: row.time("created")?,
        disco: row.maybe_bytes("disco")?.map(DiscoKey),
        home: row.maybe_int(column)?.map(region).transpose()?,
    })
}

impl Tx {
    /// A node id that no node of this network has or had.
    ///
    /// # Errors
    /// The database's.
    pub async fn next_node_id(&mut self, network: NetworkId) -> Result<NodeId, StoreError> {
        let sql = "UPDATE networks SET next_node = next_node + 1 WHERE id = $1 RETURNING next_node";
        let row = self.row(sql, &[network.into()]).await?;
        let next = row
            .ok_or(StoreError::Corrupt {
                column: "next_node",
            })?
            .unsigned("next_node")?;
        Ok(NodeId(next - 1))
    }

    /// A host number from 1 to `last` that no node of this network has, or `None` if all are
    /// taken. Numbers go up, so that an address rests as long as possible before its next owner.
    ///
    /// # Errors
    /// The database's.
    pub async fn next_host(
        &mut self,
        network: NetworkId,
        last: u64,
    ) -> Result<Option<u64>, StoreError> {
        let sql = "SELECT next_host FROM networks WHERE id = $1";
        let row = self.row(sql, &[network.into()]).await?;
        let start = row
            .ok_or(StoreError::Corrupt {
                column: "next_host",
            })?
            .unsigned("next_host")?;
        let mut found = self.free_host(network, start, last).await?;
        if found.is_none() {
            found = self.free_host(network, 1, last).await?;
        }
        if let Some(host) = found {
            let sql = "UPDATE networks SET next_host = $2 WHERE id = $1";
            let next = (host + 1).cast_signed();
            self.execute(sql, &[network.into(), next.into()]).await?;
        }
        Ok(found)
    }

    async fn free_host(
        &mut self,
        network: NetworkId,
        start: u64,
        last: u64,
    ) -> Result<Option<u64>, StoreError> {
        let sql = "SELECT host FROM nodes WHERE network = $1 AND host >= $2 ORDER BY host";
        let mut free = start;
        for row in self
            .rows(sql, &[network.into(), start.cast_signed().into()])
            .await?
        {
            if row.unsigned("host")? != free {
                break;
            }
            free += 1;
        }
        Ok((free <= last).then_some(free))
    }

    /// The node that this machine is.
    ///
    /// # Errors
    /// The database's.
    pub async fn node_by_machine(
        &mut self,
        machine: MachineId,
    ) -> Result<Option<NodeRow>, StoreError> {
        let sql = concat!("SELECT ", columns!(), " FROM nodes WHERE machine = $1");
        self.row(sql, &[(&machine.0).into()])
            .await?
            .as_ref()
            .map(node)
            .transpose()
    }

    /// The node with this id.
    ///
    /// # Errors
    /// The database's.
    pub async fn node(
        &mut self,
        network: NetworkId,
        id: NodeId,
    ) -> Result<Option<NodeRow>, StoreError> {
        let sql = concat!(
            "SELECT ",
            columns!(),
            " FROM nodes WHERE network = $1 AND id = $2"
        );
        self.row(sql, &[network.into(), id.into()])
            .await?
            .as_ref()
            .map(node)
            .transpose()
    }

    /// The names of the network's nodes.
    ///
    /// # Errors
    /// The database's.
    pub async fn names(&mut self, network: NetworkId) -> Result<BTreeSet<String>, StoreError> {
        let sql = "SELECT name FROM nodes WHERE network = $1";
        self.rows(sql, &[network.into()])
            .await?
            .iter()
            .map(|row| row.text("name"))
            .collect()
    }

    /// Whose WireGuard key this is.
    ///
    /// # Errors
    /// The database's.
    pub async fn machine_by_key(&mut self, key: NodeKey) -> Result<Option<MachineId>, StoreError> {
        let sql = "SELECT machine FROM nodes WHERE node_key = $1";
        let row = self.row(sql, &[(&key.0).into()]).await?;
        row.map(|row| row.bytes("machine").map(MachineId))
            .transpose()
    }

    /// The network's nodes, by id.
    ///
    /// # Errors
    /// The database's.
    pub async fn nodes(&mut self, network: NetworkId) -> Result<Vec<NodeRow>, StoreError> {
        self.nodes_changed_since(network, Generation(0)).await
    }

    pub(super) async fn nodes_changed_since(
        &mut self,
        network: NetworkId,
        since: Generation,
    ) -> Result<Vec<NodeRow>, StoreError> {
        let sql = concat!(
            "SELECT ",
            columns!(),
            " FROM nodes WHERE network = $1 AND changed > $2 ORDER BY id"
        );
        self.rows(sql, &[network.into(), since.into()])
            .await?
            .iter()
            .map(node)
            .collect()
    }

    /// Adds a node.
    ///
    /// # Errors
    /// [`StoreError::is_duplicate`] if name, machine, key or host is taken; or the database's.
    pub async fn insert_node(
        &mut self,
        network: &NetworkRow,
        row: &NodeRow,
    ) -> Result<(), StoreError> {
        self.execute(
            concat!(
                "INSERT INTO nodes (",
                columns!(),
                ", changed) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, \
                 NULL, $14, $15, $16, $17, $18)"
            ),
            &node_values(row, network.generation),
        )
        .await?;
        Ok(())
    }

    /// Writes a node's row anew, but for what presence says of it.
    ///
    /// # Errors
    /// As [`Tx::insert_node`].
    pub async fn update_node(
        &mut self,
        network: &NetworkRow,
        row: &NodeRow,
    ) -> Result<(), StoreError> {
        self.execute(
            "UPDATE nodes SET name = $3, machine = $4, node_key = $5, host = $6, owner = $7, \
             ephemeral = $8, advertised = $9, approved = $10, endpoints = $11, \
             listen_port = $12, seen_addr = $13, last_seen = $14, created = $15, disco = $16, \
             home = $17, changed = $18 \
             WHERE network = $1 AND id = $2",
            &node_values(row, network.generation),
        )
        .await?;
        Ok(())
    }

    /// Takes a node out of its network.
    ///
    /// # Errors
    /// The database's.
    pub async fn delete_node(
        &mut self,
        network: &NetworkRow,
        node: NodeId,
    ) -> Result<(), StoreError> {
        let sql = "DELETE FROM nodes WHERE network = $1 AND id = $2";
        self.execute(sql, &[network.id.into(), node.into()]).await?;
        self.insert_removal(network, node).await
    }
}

fn node_values(row: &NodeRow, changed: Generation) -> [Value; 18] {
    [
        row.network.into(),
        row.id.into(),
        row.name.as_str().into(),
        (&row.machine.0).into(),
        (&row.key.0).into(),
        row.host.cast_signed().into(),
        json(&row.owner),
        row.ephemeral.into(),
        json(&row.advertised),
        json(&row.approved),
        json(&row.endpoints),
        i64::from(row.listen_port).into(),
        row.seen_addr.map(|addr| addr.to_string()).into(),
        row.last_seen.into(),
        row.created.into(),
        row.disco.into(),
        row.home.into(),
        changed.into(),
    ]
}
