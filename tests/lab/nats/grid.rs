//! Every kind of router with every other: which pairs of nodes find a direct path, and how soon.
//!
//! The nodes of a table are all up before it begins, and none may talk with another. Then policy
//! lets one pair after the other, so that what is measured is how two nodes find each other that
//! never heard of each other, from the administrator's command on.
//!
//! `WEIR_FULL` runs every pair, and writes `nat-grid.md` into the results folder.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tests::lab::{Lab, results};
use tests::mesh::{Coordinator, Join, Mesh, Node, SPREAD_BOUND};
use tests::nat::{Firewall, Nat, Reflector};
use tests::probe::passes;
use tests::relay::{Relay, relays_section};
use tests::wait_until;

use super::site::{Place, Site};
use super::{SERVERS, echo, netcheck, peer};

/// How soon 95 of 100 pairs have a direct path: two seconds on a machine of its own, and this in an
/// emulator that shares one with others.
const SOON: Duration = Duration::from_secs(2);
const SOON_BESIDE_OTHERS: Duration = Duration::from_secs(6);
/// How long the first answer may take, and the direct path where one is possible.
const BOUND: Duration = Duration::from_secs(15);
/// One echo in all this time.
const ECHO: Duration = Duration::from_millis(300);
/// After so long without one there is no direct path. Both ends have begun to look three times.
const GIVE_UP: Duration = Duration::from_secs(10);
const GIVE_UP_SOON: Duration = Duration::from_secs(4);
/// Nodes that join at once.
const AT_ONCE: usize = 4;

type Spot = (&'static str, Place);

/// Two nodes, and whether a direct path is possible between them.
type Pair = (&'static str, &'static str, bool);

/// How two nodes found each other.
struct Found {
    /// From the policy that lets them talk to the first answer.
    first: Duration,
    /// And to a direct path on both sides; `None` if there is none.
    direct: Option<Duration>,
}

const fn behind(nat: Nat) -> Place {
    Place::Behind(nat)
}

/// For a run in a hurry: a hole on both sides, none at all, one that must be guessed, and IPv6 where
/// IPv4 is blocked.
const TELLING: [Spot; 6] = [
    ("port", behind(Nat::PortRestricted)),
    ("port2", behind(Nat::PortRestricted)),
    ("hard", behind(Nat::Symmetric)),
    ("turn", behind(Nat::SymmetricInTurn)),
    ("six", Place::Six(Firewall::Answers)),
    ("six2", Place::Six(Firewall::Answers)),
];
const TELLING_PAIRS: [Pair; 4] = [
    ("port", "hard", false),
    ("port", "turn", true),
    ("port", "port2", true),
    ("six", "six2", true),
];

/// Every kind for IPv4, twice.
const KINDS: [Spot; 13] = [
    ("open", Place::Open),
    ("open2", Place::Open),
    ("cone", behind(Nat::FullCone)),
    ("cone2", behind(Nat::FullCone)),
    ("addr", behind(Nat::AddressRestricted)),
    ("addr2", behind(Nat::AddressRestricted)),
    ("port", behind(Nat::PortRestricted)),
    ("port2", behind(Nat::PortRestricted)),
    ("hard", behind(Nat::Symmetric)),
    ("hard2", behind(Nat::Symmetric)),
    ("turn", behind(Nat::SymmetricInTurn)),
    ("none", behind(Nat::UdpBlocked)),
    ("none2", behind(Nat::UdpBlocked)),
];

const fn twice(home: Nat, carrier: Nat, hairpin: bool, same: bool) -> Place {
    Place::Twice {
        home,
        carrier,
        hairpin,
        same,
    }
}

/// Routers behind routers, and several nodes behind one.
const NESTED: [Spot; 10] = [
    ("open", Place::Open),
    ("port", behind(Nat::PortRestricted)),
    ("lan", behind(Nat::PortRestricted)),
    ("lan2", Place::Beside),
    (
        "twice",
        twice(Nat::PortRestricted, Nat::PortRestricted, false, false),
    ),
    (
        "thard",
        twice(Nat::PortRestricted, Nat::Symmetric, false, false),
    ),
    (
        "pin",
        twice(Nat::PortRestricted, Nat::FullCone, true, false),
    ),
    (
        "pin2",
        twice(Nat::PortRestricted, Nat::FullCone, true, true),
    ),
    (
        "nopin",
        twice(Nat::PortRestricted, Nat::FullCone, false, false),
    ),
    (
        "nopin2",
        twice(Nat::PortRestricted, Nat::FullCone, false, true),
    ),
];
const NESTED_PAIRS: [Pair; 10] = [
    ("port", "thard", false),
    ("nopin", "nopin2", false),
    ("lan", "lan2", true),
    ("lan", "port", true),
    ("lan2", "port", true),
    ("open", "twice", true),
    ("port", "twice", true),
    ("open", "thard", true),
    ("pin", "pin2", true),
    ("pin", "nopin", true),
];

/// Every kind of firewall for IPv6. `six…` have no way for IPv4 UDP.
const SIX: [Spot; 6] = [
    ("open", Place::Open),
    ("six", Place::Six(Firewall::Open)),
    ("ans", Place::Six(Firewall::Answers)),
    ("ans2", Place::Six(Firewall::Answers)),
    ("none", Place::Six(Firewall::UdpBlocked)),
    ("cone", behind(Nat::FullCone)),
];

/// What a table calls a place.
fn named(place: Place) -> String {
    match place {
        Place::Open => "open".to_owned(),
        Place::Behind(nat) => format!("{nat:?}"),
        Place::Beside => "same LAN".to_owned(),
        Place::Twice {
            home,
            carrier,
            hairpin,
            ..
        } => {
            let turns = if hairpin { " that hairpins" } else { "" };
            format!("{home:?} in {carrier:?}{turns}")
        }
        Place::Six(firewall) => format!("IPv6 {firewall:?}"),
    }
}

/// Whether a direct path is possible at all, without guessing ports but those that come in turn.
fn possible(one: Place, other: Place) -> bool {
    use Place::{Behind, Open, Six};
    let in_turn = |place| place == Behind(Nat::SymmetricInTurn);
    let hard = |place| in_turn(place) || place == Behind(Nat::Symmetric);
    let easy = |place| place == Behind(Nat::PortRestricted);
    let strict = |place| hard(place) || easy(place);
    let foreseen = in_turn(one) && easy(other) || in_turn(other) && easy(one);
    let four = |place| match place {
        Six(_) | Behind(Nat::UdpBlocked) => false,
        Open | Behind(_) | Place::Beside | Place::Twice { .. } => true,
    };
    let six = |place| matches!(place, Open | Six(Firewall::Open | Firewall::Answers));
    let guess = !foreseen && (hard(one) && strict(other) || hard(other) && strict(one));
    six(one) && six(other) || four(one) && four(other) && !guess
}

/// All pairs of these; those without a direct path first, so that they have time to find one.
fn every(spots: &[Spot]) -> Vec<Pair> {
    let later = |(number, one): (usize, &Spot)| {
        let one = *one;
        let others = spots.iter().skip(number + 1);
        others.map(move |other| (one.0, other.0, possible(one.1, other.1)))
    };
    let mut pairs: Vec<Pair> = spots.iter().enumerate().flat_map(later).collect();
    pairs.sort_by_key(|(_, _, direct)| *direct);
    pairs
}

/// A policy that lets these pairs talk, and nobody else.
fn policy(spots: &[Spot], pairs: &[Pair]) -> String {
    let owner = |(name, _): &Spot| format!("\"tag:{name}\": [\"ana@example.com\"]");
    let owners: Vec<String> = spots.iter().map(owner).collect();
    let rule = |(one, other, _): &Pair| {
        let accept = |src: &str, dst: &str| {
            format!(
                "{{\"action\": \"accept\", \"src\": [\"tag:{src}\"], \"dst\": [\"tag:{dst}:*\"]}}"
            )
        };
        format!("{}, {}", accept(one, other), accept(other, one))
    };
    let rules: Vec<String> = pairs.iter().map(rule).collect();
    format!(
        "{{\"tagOwners\": {{{}}}, \"acls\": [{}]}}",
        owners.join(", "),
        rules.join(", ")
    )
}

struct Grid {
    lab: Lab,
    mesh: Mesh,
    spots: BTreeMap<&'static str, Place>,
    _servers: Vec<Reflector>,
    _relay: Relay,
}

impl Grid {
    fn start(name: &str, spots: &[Spot]) -> anyhow::Result<Self> {
        let site = Site::new(spots);
        let lab = Lab::without_captures(name, site.topology())?;
        site.install(&lab)?;
        let hub = lab.host("hub");
        let serve = |at: &&str| Reflector::start(&hub, at.parse()?);
        let servers = SERVERS.iter().map(serve).collect::<Result<_, _>>()?;
        let mut mesh = Mesh::new(Coordinator::start(&hub)?);
        mesh.coordinator.admin("network create home")?;
        let user = "user create ana@example.com --network home";
        mesh.coordinator.admin(user)?;
        mesh.coordinator.set_policy(&policy(spots, &[]))?;
        let relay = Relay::start(&lab.host("near"), "near", &mesh.coordinator)?;
        let stun = format!("[relays]\nstun = {SERVERS:?}\n");
        let config = stun + &relays_section(&[&relay]);
        mesh.coordinator.configure(&config)?;
        let owners: Vec<String> = spots
            .iter()
            .map(|(name, _)| format!("--tag tag:{name}"))
            .collect();
        let mut joins = Vec::new();
        for ((host, _), owner) in spots.iter().zip(&owners) {
            let routes = "";
            joins.push(Join {
                host,
                owner,
                routes,
            });
        }
        for some in joins.chunks(AT_ONCE) {
            mesh.join(&lab, some)?;
        }
        let grid = Self {
            lab,
            mesh,
            spots: spots.iter().copied().collect(),
            _servers: servers,
            _relay: relay,
        };
        for (name, _) in spots {
            let node = grid.mesh.node(name);
            let known = || netcheck(&node).is_ok_and(|check| check["home"].is_string());
            wait_until("the node has a home", SPREAD_BOUND, known)?;
        }
        Ok(grid)
    }

    /// Whether both ends send to each other directly, in a session.
    fn is_direct(&self, one: &str, other: &str) -> bool {
        [(one, other), (other, one)].iter().all(|(node, name)| {
            let peer = peer(&self.mesh.node(node), name);
            let endpoint = peer["endpoint"].as_str();
            !peer["handshake_seconds"].is_null()
                && endpoint.is_some_and(|endpoint| !endpoint.starts_with("127."))
        })
    }

    /// Lets the last of these pairs talk, and waits for its direct path if there can be one.
    fn find(&self, spots: &[Spot], pairs: &[Pair]) -> anyhow::Result<(Instant, Found)> {
        let (one, other, can) = *pairs.last().context("a pair")?;
        let [left, right] = [one, other].map(|name| self.mesh.node(name));
        let question = echo(&left, &right)?;
        self.mesh.coordinator.set_policy(&policy(spots, pairs))?;
        let start = Instant::now();
        let answers = || passes(&question, ECHO).unwrap_or_default();
        wait_until("there is an answer", BOUND, answers)
            .with_context(|| self.describe([&left, &right], one, other))?;
        let first = start.elapsed();
        let mut direct = None;
        while can && direct.is_none() && start.elapsed() < BOUND {
            if self.is_direct(one, other) {
                direct = Some(start.elapsed());
            }
            passes(&question, ECHO)?;
        }
        ensure!(
            direct.is_some() == can,
            "no direct path\n{}",
            self.describe([&left, &right], one, other)
        );
        Ok((start, Found { first, direct }))
    }

    fn describe(&self, nodes: [&Arc<Node>; 2], one: &str, other: &str) -> String {
        let path = |node: &Node, name: &str| {
            let said = node.weir_with(&format!("path {name}"));
            said.map_or_else(|error| error.to_string(), |said| said.stdout + &said.stderr)
        };
        format!(
            "{one} to {other}: {}{other} to {one}: {}",
            path(nodes[0], other),
            path(nodes[1], one)
        )
    }

    /// All of these, in this order. Those that cannot be direct are looked at again in the end.
    fn table(&self, spots: &[Spot], pairs: &[Pair], full: bool) -> anyhow::Result<Table> {
        let mut table = Table::default();
        let mut relayed = Vec::new();
        for last in 0..pairs.len() {
            let pair = pairs[last];
            let found = self.find(spots, &pairs[..=last]);
            let (since, found) = found.with_context(|| format!("{pair:?}"))?;
            if found.direct.is_none() {
                relayed.push((since, pair));
            }
            let names = [pair.0, pair.1].map(|name| named(self.spots[name]));
            table.rows.entry(names.into()).or_default().push(found);
        }
        let patience = if full { GIVE_UP } else { GIVE_UP_SOON };
        for (since, (one, other, _)) in relayed {
            let question = echo(&self.mesh.node(one), &self.mesh.node(other))?;
            // Traffic, so that they go on looking.
            while since.elapsed() < patience {
                ensure!(passes(&question, BOUND)?, "{one} and {other}: no relay");
            }
            ensure!(passes(&question, BOUND)?, "{one} and {other}: no relay");
            ensure!(
                !self.is_direct(one, other),
                "{one} and {other}: by what path?"
            );
        }
        Ok(table)
    }
}

/// What was found, by what the two places are called.
#[derive(Default)]
struct Table {
    rows: BTreeMap<(String, String), Vec<Found>>,
}

impl Table {
    fn times(&self) -> Vec<Duration> {
        let direct = |found: &Found| found.direct;
        let mut times: Vec<Duration> = self.rows.values().flatten().filter_map(direct).collect();
        times.sort();
        times
    }

    /// For people: where there are several pairs of a kind, the slowest.
    fn lines(&self) -> anyhow::Result<String> {
        let seconds = |time: Duration| format!("{:.1} s", time.as_secs_f64());
        let mut lines = String::new();
        for ((one, other), found) in &self.rows {
            let path = found[0].direct.map_or("relay", |_| "direct");
            let first = found.iter().map(|found| found.first).max();
            let direct = found.iter().filter_map(|found| found.direct).max();
            let [first, direct] = [first, direct].map(|it| it.map_or("–".to_owned(), seconds));
            let pairs = found.len();
            writeln!(
                lines,
                "| {one} | {other} | {pairs} | {path} | {first} | {direct} |"
            )?;
        }
        Ok(lines)
    }
}

/// Every kind of router with every other, with a relay for those that no direct path can join.
#[test]
fn every_pair_of_nats_goes_direct_where_it_can_and_by_relay_where_not() -> anyhow::Result<()> {
    let full = std::env::var_os("WEIR_FULL").is_some();
    let tables: Vec<(&str, &[Spot], Vec<Pair>)> = match full {
        false => vec![("nat-grid", &TELLING, TELLING_PAIRS.to_vec())],
        true => vec![
            ("nat-grid", &KINDS, every(&KINDS)),
            ("nat-nested", &NESTED, NESTED_PAIRS.to_vec()),
            ("nat-six", &SIX, every(&SIX)),
        ],
    };
    let mut text = "| one | the other | pairs | path | first answer | direct after |\n".to_owned();
    text += "|---|---|---|---|---|---|\n";
    let mut times = Vec::new();
    for (name, spots, pairs) in tables {
        let grid = Grid::start(name, spots)?;
        let table = grid.table(spots, &pairs, full)?;
        let lines = table.lines()?;
        print!("{lines}");
        text += &lines;
        times.extend(table.times());
        grid.lab.passed();
    }
    times.sort();
    let p95 = times[times.len() * 95 / 100];
    let median = times[times.len() / 2];
    let last = format!(
        "\n{} direct paths; half of them within {median:.1?}, 95 of 100 within {p95:.1?}.\n",
        times.len()
    );
    println!("{last}");
    std::fs::create_dir_all(results())?;
    std::fs::write(results().join("nat-grid.md"), text.clone() + &last)?;
    let soon = if full { SOON } else { SOON_BESIDE_OTHERS };
    ensure!(p95 <= soon, "too late: {p95:?}\n{text}");
    Ok(())
}
