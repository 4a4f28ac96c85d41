//! The kernel does what the engine believes that steps do.
//!
//! The engine keeps its picture of the kernel current by `Observed::apply` instead of reading the
//! kernel back after every change. Here scripts of steps, random but always the same, go through
//! that model and through the agent's hands on a real kernel; after each step both must hold the
//! same. And the hands' costs: one changed peer is one peer in one message; ten thousand go over in
//! one pass; what is not ours is never touched.
//!
//! ```text
//!   h ── one namespace, its device `model0` and, as foreign state, `eth0` with addresses, routes
//! ```

use agent::kernel::{Config, Kernel};
use engine::plan::{
    Device, Observed, PeerChange, Present, RouteMtu, Stats, Step, Wanted, WantedPeer, diff,
};
use proto::key::{NodeKey, NodeSecret};
use proto::net::Prefix;
use proto::netmap::MAX_ROUTES_PER_NODE;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;
use tests::host::Host;
use tests::lab::Lab;
use tests::topology::Topology;

const INTERFACE: &str = "model0";
const SECRET: [u8; 32] = [7; 32];
/// Steps of one script, and how many scripts.
const STEPS: usize = 60;
const SCRIPTS: u64 = 12;

/// Numbers that look random and are the same each time (Knuth's MMIX generator).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        let next = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = next.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    fn coin(&mut self) -> bool {
        self.roll(2) == 0
    }
}

/// Runs `work` with the agent's hands in the host's namespace.
fn with_kernel<T: Send>(host: &Host, work: impl AsyncFnOnce(&mut Kernel) -> T + Send) -> T {
    let folder = tempfile::tempdir().expect("a folder");
    let config = Config {
        interface: INTERFACE.to_owned(),
        bpf_dir: folder.path().join("bpf"),
        switches: folder.path().join("switches"),
        lend_secret: Box::new(|tell| tell(&SECRET)),
    };
    host.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let mut kernel = Kernel::open(config).expect("a kernel");
            work(&mut kernel).await
        })
    })
}

fn lab(name: &str) -> (Lab, Arc<Host>) {
    let topology = Topology::new()
        .switch("net")
        .host("h", &[("net", "10.1.0.1/24")]);
    let lab = Lab::without_captures(name, &topology).expect("a lab");
    let host = lab.host("h");
    (lab, host)
}

fn key(n: u64) -> NodeKey {
    let mut bytes = [1; 32];
    bytes[..8].copy_from_slice(&n.to_be_bytes());
    NodeKey(bytes)
}

fn own_key() -> NodeKey {
    NodeSecret::from_bytes(SECRET).public()
}

fn prefix(n: u64) -> Prefix {
    let [.., a, b] = n.to_be_bytes();
    match n % 4 {
        0 => Prefix::containing(IpAddr::from([10, 200, b, 0]), 24),
        1 => Prefix::containing(IpAddr::from([0xfd01, b.into(), 0, 0, 0, 0, 0, 0]), 48),
        2 => Ok(Prefix::host(IpAddr::from([100, 64, a, b]))),
        _ => Ok(Prefix::host(IpAddr::from([
            0xfd00, 0, 0, 0, 0, 0, 0, n as u16,
        ]))),
    }
    .expect("a prefix")
}

fn prefixes(dice: &mut Dice) -> BTreeSet<Prefix> {
    (0..dice.roll(5)).map(|_| prefix(dice.roll(12))).collect()
}

fn mtu(dice: &mut Dice) -> RouteMtu {
    RouteMtu {
        mtu: 1280 + 20 * dice.roll(8) as u32,
        mss: 1140 * dice.roll(2) as u32,
    }
}

/// The next step of a script. What no plan does is left out: a device that comes up without a port
/// (the kernel picks one), routes to a device that is down (refused).
fn roll_step(dice: &mut Dice, model: &Observed) -> Step {
    let Some(device) = model.present() else {
        return Step::CreateLink { mtu: 1420 };
    };
    let configure = |dice: &mut Dice| Step::Configure {
        key: own_key(),
        listen_port: 40_000 + dice.roll(3) as u16,
    };
    if device.listen_port == 0 {
        return configure(dice);
    }
    let addr = |n: u64| -> IpAddr {
        match n {
            0 => [100, 64, 0, 77].into(),
            1 => [100, 64, 0, 78].into(),
            n => [0xfd00, 0, 0, 0, 0, 0, 7, n as u16].into(),
        }
    };
    match dice.roll(15) {
        0 => Step::SetMtu(1280 + 20 * dice.roll(8) as u32),
        1 => Step::SetUp(dice.roll(4) != 0),
        2 => configure(dice),
        3..7 => {
            let change = |dice: &mut Dice| PeerChange {
                key: key(dice.roll(6)),
                create: dice.coin(),
                replace_allowed_ips: dice.coin(),
                allowed_ips: prefixes(dice),
                endpoint: dice.coin().then(|| {
                    let ip: IpAddr = if dice.coin() {
                        [192, 0, 2, dice.roll(9) as u8].into()
                    } else {
                        [0x2001, 0xdb8, 0, 0, 0, 0, 0, dice.roll(9) as u16].into()
                    };
                    (ip, 1000).into()
                }),
                keepalive: dice.coin().then(|| dice.roll(3) as u16 * 25),
            };
            Step::SetPeers((0..=dice.roll(3)).map(|_| change(dice)).collect())
        }
        7 => Step::RemovePeers((0..dice.roll(3)).map(|_| key(dice.roll(6))).collect()),
        8 | 9 => Step::AddAddr(addr(dice.roll(4))),
        10 => {
            let addr = addr(dice.roll(4));
            Step::RemoveAddr(addr, Prefix::host(addr).len())
        }
        11 if device.up => Step::AddRoute(prefix(dice.roll(2)), mtu(dice)),
        12 if device.up => Step::ChangeRoute(prefix(dice.roll(2)), mtu(dice)),
        13 => Step::RemoveRoute(prefix(dice.roll(2))),
        14 if dice.roll(8) == 0 => Step::DeleteLink,
        _ => Step::SetUp(true),
    }
}

/// What is compared: all but what the kernel counts.
fn comparable(observed: &Observed) -> Observed {
    let mut observed = observed.clone();
    if let Device::Present(device) = &mut observed.device {
        for peer in device.peers.values_mut() {
            peer.stats = Stats {
                endpoint: peer.stats.endpoint,
                ..Stats::default()
            };
        }
    }
    observed
}

#[test]
fn the_kernel_does_what_the_engine_believes() {
    let (lab, host) = lab("kernel_model");
    let foreign = "addr show dev eth0; route show dev eth0; -6 route show dev eth0; rule show";
    let look = || -> Vec<String> {
        let lines = foreign.split("; ").map(|line| format!("ip {line}"));
        let outputs = lines.map(|line| host.run(&line).expect("ip runs").stdout);
        outputs.collect()
    };
    host.ip("addr add 203.0.113.5/28 dev eth0\n\
         route add 198.51.100.0/24 via 10.1.0.254\n\
         route add 172.30.0.0/16 dev eth0 proto 119\n\
         route add blackhole 172.31.0.0/16")
        .expect("foreign state");
    let before = look();
    for seed in 1..=SCRIPTS {
        with_kernel(&host, async |kernel| {
            let (mut dice, mut model) = (Dice(seed), Observed::default());
            let mut script = Vec::new();
            for _ in 0..STEPS {
                let step = roll_step(&mut dice, &model);
                script.push(step.clone());
                model.apply(&step);
                let done = kernel.apply(std::slice::from_ref(&step)).await;
                done.unwrap_or_else(|error| panic!("seed {seed}: {error:?} at {script:#?}"));
                let real = kernel.observe().await.expect("readable");
                assert_eq!(
                    comparable(&real),
                    comparable(&model),
                    "seed {seed}, real and model, after {script:#?}"
                );
            }
            let gone = kernel.apply(&[Step::DeleteLink]).await;
            gone.expect("it can be deleted");
        });
    }
    assert_eq!(look(), before, "foreign state was touched");
    lab.passed();
}

/// A device as an engine wants it, without the programs, which are not the matter here.
fn wanted(peers: BTreeMap<NodeKey, WantedPeer>) -> Wanted {
    Wanted {
        key: own_key(),
        listen_port: 40_000,
        mtu: 1420,
        addrs: [[100, 127, 255, 1].into()].into(),
        peers,
        routes: [(
            "100.64.0.0/10".parse().expect("a prefix"),
            RouteMtu::default(),
        )]
        .into(),
        forwarding: BTreeSet::new(),
        policy: Arc::new(engine::plan::Policy {
            serial: 1,
            change: engine::acl::Change::None,
            tables: Arc::default(),
        }),
    }
}

fn many_peers() -> BTreeMap<NodeKey, WantedPeer> {
    let peer = |n: u32| {
        let v4 = IpAddr::from((0x6440_0000 + n).to_be_bytes());
        let v6 = IpAddr::from([0xfd00, 0, 0, 0, 0, 0, (n >> 16) as u16, n as u16]);
        let wanted = WantedPeer {
            allowed_ips: [Prefix::host(v4), Prefix::host(v6)].into(),
            endpoint: Some(([192, 0, 2, 1], 1000).into()),
            keepalive: 0,
            mute: false,
        };
        (key(n.into()), wanted)
    };
    (1..=10_000).map(peer).collect()
}

/// The plan without the steps for programs, and without the greeting.
fn plan(wanted: &Wanted, observed: &Observed) -> Vec<Step> {
    let without = |step: &Step| !matches!(step, Step::AttachAcl | Step::SetAcl(_) | Step::Greet(_));
    let mut steps = diff(&Some(wanted.clone()), observed);
    steps.retain(without);
    steps
}

/// What is there, as if the programs were on it.
fn protected(mut observed: Observed) -> Observed {
    observed.acl = engine::plan::Acl::Attached(Some(1));
    observed
}

#[test]
fn ten_thousand_peers_go_over_in_one_pass_and_one_alone() {
    let (lab, host) = lab("ten_thousand");
    with_kernel(&host, async |kernel| {
        let mut wanted = wanted(many_peers());
        let start = Instant::now();
        let all = plan(&wanted, &Observed::default());
        kernel.apply(&all).await.expect("all peers");
        let (took, written) = (start.elapsed(), kernel.written());
        println!("10,000 peers: {took:?}, {written:?}");
        assert_eq!(written.peers, 10_000, "each once");
        assert!(written.messages < 200, "{} messages", written.messages);

        let start = Instant::now();
        let seen = protected(kernel.observe().await.expect("readable"));
        println!("one dump: {:?}", start.elapsed());
        assert_eq!(plan(&wanted, &seen), [], "what was wanted is there");

        let changed = wanted.peers.get_mut(&key(5_000)).expect("it is there");
        changed.allowed_ips.insert(prefix(0));
        let before = kernel.written();
        let start = Instant::now();
        kernel.apply(&plan(&wanted, &seen)).await.expect("one peer");
        println!("one peer of 10,000: {:?}", start.elapsed());
        let after = kernel.written();
        assert_eq!(after.peers - before.peers, 1);
        assert_eq!(after.messages - before.messages, 1);
        let seen = protected(kernel.observe().await.expect("readable"));
        assert_eq!(plan(&wanted, &seen), []);
        kernel.apply(&[Step::DeleteLink]).await.expect("deleted");
    });
    lab.passed();
}

#[test]
fn a_peer_with_the_most_routes_is_whole_and_loses_one_without_a_gap() {
    let (lab, host) = lab("many_routes");
    with_kernel(&host, async |kernel| {
        let route = |n: usize| {
            let addr = IpAddr::from([0xfd02, n as u16, 0, 0, 0, 0, 0, 0]);
            Prefix::containing(addr, 32).expect("a prefix")
        };
        let peer = WantedPeer {
            allowed_ips: (0..MAX_ROUTES_PER_NODE).map(route).collect(),
            endpoint: None,
            keepalive: 25,
            mute: false,
        };
        let mut wanted = wanted([(key(1), peer)].into());
        let all = plan(&wanted, &Observed::default());
        kernel.apply(&all).await.expect("all routes");
        let seen = protected(kernel.observe().await.expect("readable"));
        assert_eq!(plan(&wanted, &seen), []);
        let peer = wanted.peers.get_mut(&key(1)).expect("it is there");
        peer.allowed_ips.remove(&route(5));
        let before = kernel.written();
        kernel.apply(&plan(&wanted, &seen)).await.expect("one less");
        assert_eq!(
            kernel.written().messages - before.messages,
            1,
            "all at once"
        );
        let seen = protected(kernel.observe().await.expect("readable"));
        let Some(Present { peers, .. }) = seen.present() else {
            panic!("it is there");
        };
        assert_eq!(peers[&key(1)].allowed_ips.len(), MAX_ROUTES_PER_NODE - 1);
        kernel.apply(&[Step::DeleteLink]).await.expect("deleted");
    });
    lab.passed();
}
