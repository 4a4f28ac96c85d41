//! Random commands on a network, watched by streams that come and go: whatever the order, the
//! deltas of each stream lead to exactly the netmap that the rows as they stand make.

use crate::postgres::Postgres;
use coordinator::config::Relays;
use coordinator::network::{self, Actor, NewToken, node};
use coordinator::snapshot::Snapshot;
use coordinator::store::{Store, Timestamp};
use coordinator::watch::{Updates, Watch};
use proto::control::{KeyProof, PollMessage, RegisterRequest, Report, TokenSecret};
use proto::id::{Generation, NetworkId, NodeId, RegionId};
use proto::key::{DiscoKey, MachineId, NodeKey};
use proto::netmap::{Netmap, Owner, Update};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

const STEPS: usize = 150;
/// Less than the time after which a stream says that nothing changed.
const BOUND: Duration = Duration::from_secs(10);

const POLICIES: [&str; 5] = [
    r#"{"acls": []}"#,
    r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#,
    r#"{"tagOwners": {"tag:a": [], "tag:b": []},
        "acls": [{"action": "accept", "src": ["tag:a"], "dst": ["tag:b:22"]}]}"#,
    r#"{"groups": {"group:g": ["ana@example.com", "ben@example.com"]},
        "acls": [{"action": "accept", "src": ["group:g"], "dst": ["10.1.0.0/16:*"]},
                 {"action": "accept", "src": ["ana@example.com"], "dst": ["autogroup:self:*"]}]}"#,
    r#"{"tagOwners": {"tag:a": []},
        "acls": [{"action": "accept", "src": ["10.2.0.0/16"], "dst": ["tag:a:80", "10.1.0.0/16:*"]},
                 {"action": "accept", "src": ["autogroup:member"], "dst": ["tag:a:443"]}]}"#,
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_sqlite_every_stream_of_deltas_ends_in_the_whole_netmap() {
    for seed in [1, 2, 3] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_sqlite(&dir.path().join("db")).await.unwrap();
        Model::start(store, seed).await.run().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_every_stream_of_deltas_ends_in_the_whole_netmap() {
    let test = "on_postgres_every_stream_of_deltas_ends_in_the_whole_netmap";
    let Some(postgres) = Postgres::start(test) else {
        return;
    };
    for seed in [4, 5] {
        let store = Store::open_url(&postgres.url()).await.unwrap();
        Model::start(store, seed).await.run().await;
    }
}

/// A small generator (xorshift64*), so that a seed is a reproduction.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let mixed = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(mixed).unwrap() % limit
    }
}

struct Model {
    store: Store,
    watch: Arc<Watch>,
    network: NetworkId,
    tokens: Vec<TokenSecret>,
    random: Random,
    nodes: BTreeMap<NodeId, (MachineId, String)>,
    streams: BTreeMap<NodeId, (Updates, Option<Netmap>)>,
    /// Netmaps of streams that ended, to come back with.
    kept: BTreeMap<NodeId, Netmap>,
    next_key: u64,
    seed: u64,
}

impl Model {
    async fn start(store: Store, seed: u64) -> Self {
        let now = Timestamp(1);
        let actor = Actor::Coordinator;
        let v4 = Some("10.9.0.0/16".parse().unwrap());
        let name = format!("net-{seed}");
        let network = network::create(&store, now, &actor, (&name, v4, None))
            .await
            .unwrap()
            .id;
        let mut tokens = Vec::new();
        for login in ["ana@example.com", "ben@example.com"] {
            network::create_user(&store, now, &actor, network, login)
                .await
                .unwrap();
        }
        for owner in [
            Owner::User("ana@example.com".to_owned()),
            Owner::User("ben@example.com".to_owned()),
            Owner::Tags(BTreeSet::from(["tag:a".to_owned()])),
            Owner::Tags(BTreeSet::from(["tag:a".to_owned(), "tag:b".to_owned()])),
        ] {
            let valid = Duration::from_secs(1_000_000);
            let new = NewToken {
                owner,
                reusable: true,
                ephemeral: false,
                valid,
            };
            let made = network::create_token(&store, now, &actor, network, new)
                .await
                .unwrap();
            tokens.push(made.0);
        }
        Self {
            watch: Watch::start(store.clone(), Relays::default()),
            store,
            network,
            tokens,
            random: Random(seed),
            nodes: BTreeMap::new(),
            streams: BTreeMap::new(),
            kept: BTreeMap::new(),
            next_key: seed << 32,
            seed,
        }
    }

    async fn run(mut self) {
        for step in 0..STEPS {
            self.command(step).await;
            if self.random.below(3) == 0 {
                self.come_or_go().await;
            }
            if self.random.below(2) == 0 {
                self.check(step).await;
            }
        }
        self.check(STEPS).await;
    }

    fn key(&mut self) -> [u8; 32] {
        self.next_key += 1;
        let mut key = [7; 32];
        key[..8].copy_from_slice(&self.next_key.to_be_bytes());
        key
    }

    fn any_node(&mut self) -> Option<(NodeId, MachineId, String)> {
        let index = self.random.below(self.nodes.len().max(1));
        self.nodes
            .iter()
            .nth(index)
            .map(|(id, (machine, name))| (*id, *machine, name.clone()))
    }

    async fn command(&mut self, step: usize) {
        let now = Timestamp(2 + i64::try_from(step).unwrap());
        let actor = Actor::Coordinator;
        match self.random.below(10) {
            0..=2 => self.join(now).await,
            3 => {
                if let Some((id, _, name)) = self.any_node() {
                    let done = network::remove_node(&self.store, now, &actor, self.network, &name);
                    done.await.unwrap();
                    self.nodes.remove(&id);
                    self.kept.remove(&id);
                }
            }
            4 => {
                let text = POLICIES[self.random.below(POLICIES.len())];
                network::set_policy(&self.store, now, &actor, self.network, text)
                    .await
                    .unwrap();
            }
            5 => {
                let login = format!("user{step}@example.com");
                let done = network::create_user(&self.store, now, &actor, self.network, &login);
                done.await.unwrap();
            }
            6 => self.approve(now).await,
            7 => {
                if let Some((id, ..)) = self.any_node() {
                    let online = self.random.below(2) == 0;
                    let nodes = [(id, online)];
                    let done = node::set_presence(&self.store, now, "r", self.network, &nodes);
                    done.await.unwrap();
                }
            }
            _ => self.report(now).await,
        }
    }

    async fn join(&mut self, now: Timestamp) {
        let (machine, key) = (MachineId(self.key()), NodeKey(self.key()));
        let token = self.tokens[self.random.below(self.tokens.len())].clone();
        let request = RegisterRequest {
            token: Some(token),
            key,
            proof: proof(),
            hostname: "node".to_owned(),
            routes: BTreeSet::new(),
            endpoints: Vec::new(),
            listen_port: 1,
            disco: None,
        };
        let at = node::Machine {
            id: machine,
            addr: [192, 0, 2, 1].into(),
        };
        let registered = node::register(&self.store, now, at, &request)
            .await
            .unwrap();
        self.nodes
            .insert(registered.node, (machine, registered.name));
    }

    async fn report(&mut self, now: Timestamp) {
        let Some((_, id, _)) = self.any_node() else {
            return;
        };
        let third = u8::try_from(self.random.below(4)).unwrap();
        let routes = [format!("10.1.{third}.0/24"), format!("10.2.{third}.0/24")];
        let count = self.random.below(3);
        let report = Report {
            routes: routes
                .iter()
                .take(count)
                .map(|route| route.parse().unwrap())
                .collect(),
            endpoints: vec![([198, 51, 100, third], 1).into()],
            listen_port: 1,
            disco: Some(DiscoKey([third; 32])),
            home: (third > 0).then_some(RegionId(u16::from(third))),
        };
        let at = node::Machine {
            id,
            addr: [192, 0, 2, third].into(),
        };
        node::report(&self.store, now, at, &report).await.unwrap();
    }

    async fn approve(&mut self, now: Timestamp) {
        let Some((id, _, name)) = self.any_node() else {
            return;
        };
        let mut tx = self.store.read().await.unwrap();
        let row = tx.node(self.network, id).await.unwrap().unwrap();
        drop(tx);
        if let Some(route) = row.advertised.first() {
            let wanted = (name.as_str(), *route);
            // It may overlap what another node serves.
            let _ =
                network::approve_route(&self.store, now, &Actor::Coordinator, self.network, wanted)
                    .await;
        }
    }

    /// A node starts to listen, from where it was, or stops.
    async fn come_or_go(&mut self) {
        let Some((id, ..)) = self.any_node() else {
            return;
        };
        if let Some((_, netmap)) = self.streams.remove(&id) {
            self.kept.extend(netmap.map(|netmap| (id, netmap)));
            return;
        }
        let mut tx = self.store.read().await.unwrap();
        let at_least = tx.network(self.network).await.unwrap().unwrap().generation;
        drop(tx);
        let kept = self.kept.remove(&id);
        let base = kept.as_ref().map(|netmap| netmap.generation);
        let updates = self
            .watch
            .subscribe(self.network, id, at_least, base)
            .await
            .unwrap();
        self.streams.insert(id, (updates, kept));
    }

    async fn check(&mut self, step: usize) {
        let mut tx = self.store.read().await.unwrap();
        let rows = tx.load(self.network, None).await.unwrap().unwrap();
        drop(tx);
        let whole = Snapshot::build(rows).unwrap();
        let streams = std::mem::take(&mut self.streams);
        for (id, (mut updates, mut netmap)) in streams {
            let place = format!("seed {}, step {step}, node {id}", self.seed);
            let Some(wanted) = whole.view_for(id) else {
                while timeout(BOUND, updates.next())
                    .await
                    .expect(&place)
                    .is_some()
                {}
                continue;
            };
            let follow = async {
                while !same(netmap.as_ref(), &wanted) {
                    let message = updates.next().await.expect(&place);
                    apply(&mut netmap, message, &place);
                }
            };
            let reached = timeout(BOUND, follow).await.is_ok();
            assert!(
                reached,
                "{place}: stays at\n{netmap:#?}\nand should be\n{wanted:#?}"
            );
            self.streams.insert(id, (updates, netmap));
        }
    }
}

/// A netmap may carry an older generation if nothing of it changed since.
fn same(netmap: Option<&Netmap>, wanted: &Netmap) -> bool {
    netmap.is_some_and(|netmap| {
        let at = Generation(wanted.generation.0.max(netmap.generation.0));
        let (mut a, mut b) = (netmap.clone(), wanted.clone());
        (a.generation, b.generation) = (at, at);
        a == b
    })
}

fn apply(netmap: &mut Option<Netmap>, message: PollMessage, place: &str) {
    match message {
        PollMessage::KeepAlive => {}
        PollMessage::Update(Update::Full(full)) => *netmap = Some(*full),
        PollMessage::Update(Update::Delta(delta)) => {
            netmap.as_mut().expect(place).apply(*delta).expect(place);
        }
    }
}

/// Proofs are checked at the door, not by the commands.
fn proof() -> KeyProof {
    serde_json::from_str("\"\"").unwrap()
}
