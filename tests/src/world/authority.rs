//! The coordinator of a world: the real one's view of rows, without its store and its doors.
//!
//! Nodes with an odd number belong to ana, those with an even one to bob. Ana may ask everybody;
//! bob may ask nobody but his own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use coordinator::config::Relays;
use coordinator::snapshot::{Snapshot, delta};
use coordinator::store::{NetworkRow, NodeRow, Rows, Timestamp};
use proto::control::Report;
use proto::id::{Generation, NetworkId, NodeId, RegionId};
use proto::key::{DiscoKey, MachineId, NodeKey};
use proto::net::Prefix;
use proto::netmap::{Netmap, Owner, Region, RelayHost, Update};

use super::PORT;

const NETWORK: NetworkId = NetworkId(1);
const USERS: [&str; 2] = ["ana@example.com", "bob@example.com"];
const POLICY: &str = r#"{"acls": [
    {"action": "accept", "src": ["ana@example.com"], "dst": ["*:*"]},
    {"action": "accept", "src": ["bob@example.com"], "dst": ["bob@example.com:*"]},
]}"#;
/// UDP port of the relays' STUN.
pub const STUN: u16 = 3478;

/// A region's id.
pub fn region(index: usize) -> RegionId {
    RegionId(u16::try_from(index + 1).unwrap_or(u16::MAX))
}

/// Where a region's relay is.
pub fn relay_addr(index: usize) -> IpAddr {
    let number = u8::try_from(index + 1).unwrap_or(u8::MAX);
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, number))
}

/// Who belongs to whom.
fn owner(id: NodeId) -> &'static str {
    USERS[usize::from(id.0.is_multiple_of(2))]
}

/// What of the real coordinator a world needs.
pub struct Authority {
    relays: Relays,
    rows: BTreeMap<NodeId, NodeRow>,
    now: Snapshot,
    /// What each node was told last.
    told: BTreeMap<NodeId, Snapshot>,
}

impl Authority {
    /// An empty network with so many relay regions.
    ///
    /// # Errors
    /// If its policy does not compile.
    pub fn new(regions: usize) -> anyhow::Result<Authority> {
        let host = |index| RelayHost {
            addr: format!("{}:443", relay_addr(index)),
            stun: Some(STUN),
            plain: true,
            certificate: None,
        };
        let entry = |index| {
            let place = Region {
                name: format!("region {}", index + 1),
                hosts: vec![host(index)],
            };
            (region(index), place)
        };
        let relays = Relays {
            stun: Vec::new(),
            regions: (0..regions).map(entry).collect(),
        };
        let now = snapshot(1, &BTreeMap::new(), &relays)?;
        Ok(Authority {
            relays,
            rows: BTreeMap::new(),
            now,
            told: BTreeMap::new(),
        })
    }

    /// Takes in a node.
    ///
    /// # Errors
    /// If policy does not compile for the network that it leads to.
    pub fn join(&mut self, number: u8, key: NodeKey, disco: DiscoKey) -> anyhow::Result<NodeId> {
        let id = NodeId(number.into());
        let row = NodeRow {
            network: NETWORK,
            id,
            name: format!("n{number}"),
            machine: MachineId([number; 32]),
            key,
            host: number.into(),
            owner: Owner::User(owner(id).to_owned()),
            ephemeral: false,
            advertised: BTreeSet::new(),
            approved: BTreeSet::new(),
            endpoints: Vec::new(),
            listen_port: PORT,
            seen_addr: None,
            disco: Some(disco),
            home: None,
            online: true,
            last_seen: Timestamp(0),
            created: Timestamp(0),
        };
        self.rows.insert(id, row);
        self.advance()?;
        Ok(id)
    }

    /// Takes in what a node says of itself; whether that is news.
    pub fn report(&mut self, id: NodeId, report: &Report) -> bool {
        let Some(row) = self.rows.get_mut(&id) else {
            return false;
        };
        let before = row.clone();
        row.endpoints.clone_from(&report.endpoints);
        row.disco = report.disco.or(row.disco);
        row.home = report.home;
        before != *row && self.advance().is_ok()
    }

    /// Everything that a node may know.
    pub fn full(&mut self, id: NodeId) -> Option<Netmap> {
        self.told.insert(id, self.now.clone());
        self.now.view_for(id)
    }

    /// What is new for a node since it was told.
    pub fn news(&mut self, id: NodeId) -> Option<Update> {
        let Some(told) = self.told.get(&id) else {
            let netmap = self.full(id)?;
            return Some(Update::Full(Box::new(netmap)));
        };
        let news = delta(told, &self.now, id, told.generation())?;
        self.told.insert(id, self.now.clone());
        Some(Update::Delta(Box::new(news)))
    }

    /// A node's address in the network.
    pub fn addr(&self, id: NodeId) -> IpAddr {
        let view = self.now.view_for(id);
        let addrs = view.map(|view| view.me.addrs).unwrap_or_default();
        let v4 = addrs.into_iter().find(IpAddr::is_ipv4);
        v4.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
    }

    /// Whether the one may ask the other; said here a second time, beside the policy's text.
    pub fn permits(&self, asker: NodeId, asked: NodeId) -> bool {
        owner(asker) == USERS[0] || owner(asked) == USERS[1]
    }

    fn advance(&mut self) -> anyhow::Result<()> {
        self.now = snapshot(self.now.generation().0 + 1, &self.rows, &self.relays)?;
        Ok(())
    }
}

fn snapshot(
    generation: u64,
    nodes: &BTreeMap<NodeId, NodeRow>,
    relays: &Relays,
) -> anyhow::Result<Snapshot> {
    let prefix = |text: &str| text.parse::<Prefix>();
    let network = NetworkRow {
        id: NETWORK,
        name: "world".into(),
        v4: prefix("100.64.0.0/10")?,
        v6: prefix("fd00:1::/48")?,
        generation: Generation(generation),
        policy_generation: Generation(1),
    };
    let users = USERS.map(str::to_owned).to_vec();
    let rows = Rows {
        network,
        complete: true,
        policy: Some((users, Some(POLICY.to_owned()))),
        nodes: nodes.values().cloned().collect(),
        removed: Vec::new(),
    };
    let built = Snapshot::build(rows).map_err(|wrong| anyhow::anyhow!("{wrong:?}"))?;
    Ok(built.with_relays(relays))
}
