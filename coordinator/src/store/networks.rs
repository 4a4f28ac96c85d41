//! Networks, their users and their policy.

use super::{NodeRow, Row, StoreError, Timestamp, Tx, Value};
use proto::id::{Generation, NetworkId, NodeId};
use proto::net::Prefix;

/// Removals remembered for replicas that catch up; one further behind reads the whole network.
const REMOVALS_KEPT: u64 = 10_000;

/// A network as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkRow {
    /// Its id.
    pub id: NetworkId,
    /// Its name.
    pub name: String,
    /// Nodes' IPv4 addresses come from here.
    pub v4: Prefix,
    /// Nodes' IPv6 addresses come from here.
    pub v6: Prefix,
    /// Raised by every change.
    pub generation: Generation,
    /// The generation at which users or policy changed last.
    pub policy_generation: Generation,
}

/// A network to be made.
pub struct NewNetwork<'a> {
    /// Its id, not guessable from other networks' ids.
    pub id: NetworkId,
    /// Its name.
    pub name: &'a str,
    /// See [`NetworkRow::v4`].
    pub v4: Prefix,
    /// See [`NetworkRow::v6`].
    pub v6: Prefix,
}

/// All of a network, or what changed of it since a generation.
#[derive(Debug)]
pub struct Rows {
    /// The network itself, always.
    pub network: NetworkRow,
    /// Whether this is everything: what is not here does not exist.
    pub complete: bool,
    /// Users and policy, if they changed.
    pub policy: Option<(Vec<String>, Option<String>)>,
    /// Nodes that are new or changed.
    pub nodes: Vec<NodeRow>,
    /// Nodes that are gone.
    pub removed: Vec<NodeId>,
}

macro_rules! columns {
    () => {
        "id, name, v4, v6, generation, policy_generation"
    };
}

fn network(row: &Row) -> Result<NetworkRow, StoreError> {
    Ok(NetworkRow {
        id: NetworkId(row.unsigned("id")?),
        name: row.text("name")?,
        v4: row.parsed("v4")?,
        v6: row.parsed("v6")?,
        generation: Generation(row.unsigned("generation")?),
        policy_generation: Generation(row.unsigned("policy_generation")?),
    })
}

impl Tx {
    /// Makes a network, at generation 1.
    ///
    /// # Errors
    /// [`StoreError::is_duplicate`] if the name is taken; or the database's.
    pub async fn insert_network(&mut self, new: NewNetwork<'_>) -> Result<(), StoreError> {
        self.execute(
            "INSERT INTO networks (id, name, v4, v6, generation, policy_generation, next_node, \
             next_host, audit_count, audit_head) VALUES ($1, $2, $3, $4, 1, 1, 1, 1, 0, $5)",
            &[
                new.id.into(),
                new.name.into(),
                new.v4.to_string().into(),
                new.v6.to_string().into(),
                (&[0; 32]).into(),
            ],
        )
        .await?;
        self.changed.push(new.id);
        Ok(())
    }

    /// Every network, by name.
    ///
    /// # Errors
    /// The database's.
    pub async fn networks(&mut self) -> Result<Vec<NetworkRow>, StoreError> {
        let sql = concat!("SELECT ", columns!(), " FROM networks ORDER BY name");
        self.rows(sql, &[]).await?.iter().map(network).collect()
    }

    /// The network with this id.
    ///
    /// # Errors
    /// The database's.
    pub async fn network(&mut self, id: NetworkId) -> Result<Option<NetworkRow>, StoreError> {
        let sql = concat!("SELECT ", columns!(), " FROM networks WHERE id = $1");
        self.row(sql, &[id.into()])
            .await?
            .as_ref()
            .map(network)
            .transpose()
    }

    /// Raises the network's generation and returns it as it then is. Every change of a network
    /// begins with this: until the end of the transaction nobody else changes that network.
    ///
    /// # Errors
    /// The database's; [`StoreError::Corrupt`] if there is no such network.
    pub async fn raise(&mut self, id: NetworkId) -> Result<NetworkRow, StoreError> {
        let sql = concat!(
            "UPDATE networks SET generation = generation + 1 WHERE id = $1 RETURNING ",
            columns!()
        );
        let row = self.row(sql, &[id.into()]).await?;
        let row = network(&row.ok_or(StoreError::Corrupt { column: "id" })?)?;
        self.changed.push(id);
        Ok(row)
    }

    /// Takes [`Tx::raise`] back: it turned out that nothing changes that a node may see.
    ///
    /// # Errors
    /// The database's.
    pub async fn lower(&mut self, network: &NetworkRow) -> Result<(), StoreError> {
        let sql = "UPDATE networks SET generation = generation - 1 WHERE id = $1";
        self.execute(sql, &[network.id.into()]).await?;
        self.changed.retain(|id| *id != network.id);
        Ok(())
    }

    /// Adds a user; `false` if the login exists already.
    ///
    /// # Errors
    /// The database's.
    pub async fn insert_user(
        &mut self,
        network: &NetworkRow,
        login: &str,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let added = self
            .execute(
                "INSERT INTO users (network, login, created) VALUES ($1, $2, $3) \
                 ON CONFLICT (network, login) DO NOTHING",
                &[network.id.into(), login.into(), now.into()],
            )
            .await?;
        self.policy_changed(network).await?;
        Ok(added == 1)
    }

    /// The network's users, oldest first.
    ///
    /// # Errors
    /// The database's.
    pub async fn users(&mut self, network: NetworkId) -> Result<Vec<String>, StoreError> {
        let sql = "SELECT login FROM users WHERE network = $1 ORDER BY created, login";
        self.rows(sql, &[network.into()])
            .await?
            .iter()
            .map(|row| row.text("login"))
            .collect()
    }

    /// The network's policy as it was written, or `None`: nothing is allowed.
    ///
    /// # Errors
    /// The database's.
    pub async fn policy(&mut self, network: NetworkId) -> Result<Option<String>, StoreError> {
        let sql = "SELECT text FROM policies WHERE network = $1";
        self.row(sql, &[network.into()])
            .await?
            .map(|row| row.text("text"))
            .transpose()
    }

    /// Replaces the network's policy.
    ///
    /// # Errors
    /// The database's.
    pub async fn set_policy(&mut self, network: &NetworkRow, text: &str) -> Result<(), StoreError> {
        self.execute(
            "INSERT INTO policies (network, text) VALUES ($1, $2) \
             ON CONFLICT (network) DO UPDATE SET text = excluded.text",
            &[network.id.into(), text.into()],
        )
        .await?;
        self.policy_changed(network).await
    }

    async fn policy_changed(&mut self, network: &NetworkRow) -> Result<(), StoreError> {
        let sql = "UPDATE networks SET policy_generation = generation WHERE id = $1";
        self.execute(sql, &[network.id.into()]).await?;
        Ok(())
    }

    /// The network as it stands, or what changed of it since generation `since`.
    ///
    /// # Errors
    /// The database's.
    pub async fn load(
        &mut self,
        id: NetworkId,
        since: Option<Generation>,
    ) -> Result<Option<Rows>, StoreError> {
        let Some(network) = self.network(id).await? else {
            return Ok(None);
        };
        let recent = |since: &Generation| {
            *since <= network.generation && network.generation.0 - since.0 < REMOVALS_KEPT
        };
        let since = since.filter(recent);
        let from = since.unwrap_or(Generation(0));
        let nodes = self.nodes_changed_since(id, from).await?;
        let removed = match since {
            Some(since) => self.removed_since(id, since).await?,
            None => Vec::new(),
        };
        let policy = if network.policy_generation > from {
            Some((self.users(id).await?, self.policy(id).await?))
        } else {
            None
        };
        Ok(Some(Rows {
            network,
            complete: since.is_none(),
            policy,
            nodes,
            removed,
        }))
    }

    async fn removed_since(
        &mut self,
        network: NetworkId,
        since: Generation,
    ) -> Result<Vec<NodeId>, StoreError> {
        let sql = "SELECT node FROM removals WHERE network = $1 AND generation > $2 ORDER BY node";
        let rows = self.rows(sql, &[network.into(), since.into()]).await?;
        rows.iter()
            .map(|row| Ok(NodeId(row.unsigned("node")?)))
            .collect()
    }

    /// Notes that a node is gone, for those who know the network as it was.
    pub(super) async fn insert_removal(
        &mut self,
        network: &NetworkRow,
        node: NodeId,
    ) -> Result<(), StoreError> {
        let values: [Value; 3] = [network.id.into(), node.into(), network.generation.into()];
        let sql = "INSERT INTO removals (network, node, generation) VALUES ($1, $2, $3)";
        self.execute(sql, &values).await?;
        let forgotten = Generation(network.generation.0.saturating_sub(REMOVALS_KEPT));
        let sql = "DELETE FROM removals WHERE network = $1 AND generation <= $2";
        self.execute(sql, &[network.id.into(), forgotten.into()])
            .await?;
        Ok(())
    }
}
