//! An engine with a kernel that does as it is told, and the networks it is told of.

use engine::plan::{Device, LiveRoute, Observed, Stats, Step};
use engine::status::{Failure, FailureKind};
use engine::{Config, Engine, Input, LinkAddr, Links, Output};
use proto::filter::Filter;
use proto::id::{Generation, NetworkId, NodeId};
use proto::key::{DiscoKey, NodeKey};
use proto::net::Prefix;
use proto::netmap::{Me, Netmap, Network, Owner, Peer, Update};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

pub const ME: NodeKey = NodeKey([99; 32]);

pub fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

pub fn peer(id: u8) -> Peer {
    Peer {
        id: NodeId(id.into()),
        name: format!("n{id}"),
        key: NodeKey([id; 32]),
        addrs: vec![[100, 64, 0, id].into()],
        routes: BTreeSet::new(),
        endpoints: vec![
            SocketAddr::from(([192, 0, 2, id], 51820)),
            SocketAddr::from(([198, 51, 100, id], 51820)),
        ],
        owner: Owner::User("ana@example.com".to_owned()),
        labels: BTreeSet::new(),
        online: true,
        disco: None,
        home: None,
    }
}

pub fn netmap(generation: u64, peers: &[u8]) -> Netmap {
    Netmap {
        generation: Generation(generation),
        network: Network {
            id: NetworkId(1),
            name: "home".to_owned(),
            v4: prefix("100.64.0.0/10"),
            v6: prefix("fd00::/48"),
            stun: Vec::new(),
            relays: BTreeMap::new(),
        },
        me: Me {
            id: NodeId(99),
            name: "me".to_owned(),
            key: ME,
            addrs: vec![[100, 64, 0, 99].into(), "fd00::99".parse().unwrap()],
            routes: BTreeSet::new(),
            owner: Owner::User("ana@example.com".to_owned()),
            labels: BTreeSet::new(),
        },
        peers: peers
            .iter()
            .map(|id| (NodeId((*id).into()), peer(*id)))
            .collect(),
        filter: Filter::default(),
        peers_empty_on_purpose: peers.is_empty(),
    }
}

pub fn full(generation: u64, peers: &[u8]) -> Input {
    Input::Netmap(Update::Full(Box::new(netmap(generation, peers))))
}

pub fn links(routes: &[(&str, &str)]) -> Links {
    Links {
        addrs: [LinkAddr {
            interface: "eth0".to_owned(),
            addr: [192, 0, 2, 99].into(),
            prefix_len: 24,
        }]
        .into(),
        routes: routes
            .iter()
            .map(|(to, interface)| LiveRoute {
                prefix: prefix(to),
                interface: (*interface).to_owned(),
            })
            .collect(),
        gateway: None,
        mtu: 1500,
    }
}

pub const HOME: &[(&str, &str)] = &[("0.0.0.0/0", "eth0"), ("192.0.2.0/24", "eth0")];

pub fn engine() -> Engine {
    let config = Config {
        interface: "weir0".to_owned(),
        listen_port: 51820,
        shim_port: 51821,
    };
    Engine::new(config, ME, DiscoKey([98; 32]), [97; 32])
}

/// A kernel that does as it is told, and what was told besides.
pub struct Driver {
    pub engine: Engine,
    pub kernel: Observed,
    pub now: Instant,
    pub plans: Vec<Vec<Step>>,
    pub told: Vec<Output>,
    pub observed: usize,
    /// Which steps fail, and how.
    pub failing: fn(&Step) -> Option<FailureKind>,
}

impl Driver {
    pub fn new() -> Self {
        let mut driver = Self {
            engine: engine(),
            kernel: Observed::default(),
            now: Instant::now(),
            plans: Vec::new(),
            told: Vec::new(),
            observed: 0,
            failing: |_| None,
        };
        driver.input(Input::Links(links(HOME)));
        driver.input(Input::Up(true));
        driver
    }

    pub fn input(&mut self, input: Input) {
        self.engine.handle(self.now, input);
        self.settle();
    }

    /// What the kernel says of a peer from now on.
    pub fn stats(&mut self, peer: NodeKey) -> &mut Stats {
        let Device::Present(device) = &mut self.kernel.device else {
            panic!("there is no device");
        };
        &mut device.peers.get_mut(&peer).expect("a peer").stats
    }

    pub fn settle(&mut self) -> Instant {
        for _ in 0..100 {
            match self.engine.poll(self.now) {
                Output::Timeout(at) => return at,
                Output::Observe => {
                    self.observed += 1;
                    let seen = Input::Observed(self.kernel.clone());
                    self.engine.handle(self.now, seen);
                }
                Output::Apply(steps) => {
                    let mut answer = Input::Applied;
                    for (done, step) in steps.iter().enumerate() {
                        if let Some(kind) = (self.failing)(step) {
                            answer = Input::Failed(Failure {
                                done,
                                kind,
                                detail: "no".to_owned(),
                            });
                            break;
                        }
                        self.kernel.apply(step);
                    }
                    self.plans.push(steps);
                    self.engine.handle(self.now, answer);
                }
                other => self.told.push(other),
            }
        }
        panic!("the engine does not come to rest");
    }

    pub fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let at = self.settle();
            if at >= end {
                break;
            }
            assert!(at > self.now, "a deadline in the past");
            self.now = at;
            self.engine.handle(self.now, Input::Timeout);
        }
        self.now = end;
    }
}
