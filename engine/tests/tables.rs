//! What the tables cost: four policies that are hard on them, lowered, counted and weighed.
//!
//! The figures stand in ARCHITECTURE.md, between two marks; `UPDATE=1 cargo test -p engine --test
//! tables` writes them anew. Bytes are what the kernel takes for a hash map of that many entries,
//! with the room that the agent leaves for what joins; they agree with `bpftool map`'s `memlock`
//! but for its constant kilobyte.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use ebpf::abi::{Identity, Page, PageKey, Ports, PortsKey};
use engine::acl::addresses::slabs_for;
use engine::acl::lines::lines_for;
use engine::acl::{Acl, Change, MAX_PAGES, PrefixKey, Table, TooLarge};
use proto::id::NodeId;
use proto::key::NodeKey;
use proto::netmap::{Me, Owner, Peer};
use proto::policy::{Compiled, Directory, DirectoryNode, DirectoryUser, parse};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

/// The node whose tables are looked at.
const HUB: NodeId = NodeId(0);

/// A network: the hub first. Each node is a user's or has tags, by whether there is an `@`.
fn directory(owners: &[String]) -> Directory {
    let mut users = BTreeSet::new();
    let node = |(number, owner): (usize, &String)| {
        let number = number as u32;
        let v4 = Ipv4Addr::from_bits(0x6440_0001 + number);
        let v6 = Ipv6Addr::new(0xfd7a, 0, 0, 0, 0, 0, (number >> 16) as u16, number as u16);
        let owner = if owner.contains('@') {
            users.insert(owner.clone());
            Owner::User(owner.clone())
        } else {
            Owner::Tags(owner.split(' ').map(str::to_owned).collect())
        };
        let node = DirectoryNode {
            name: format!("n{number}"),
            owner,
            addrs: vec![IpAddr::V4(v4), IpAddr::V6(v6)],
            routes: BTreeSet::new(),
            advertised: BTreeSet::new(),
        };
        (NodeId(number.into()), node)
    };
    let nodes = owners.iter().enumerate().map(node).collect();
    let user = |login| DirectoryUser {
        login,
        roles: BTreeSet::new(),
    };
    Directory {
        v4: "100.64.0.0/10".parse().unwrap(),
        v6: "fd7a::/48".parse().unwrap(),
        nodes,
        users: users.into_iter().map(user).collect(),
    }
}

/// Lowers a policy for the hub of a network.
struct Hub {
    compiled: Compiled,
    directory: Directory,
}

impl Hub {
    fn new(policy: &str, owners: &[String]) -> Self {
        let directory = directory(owners);
        let policy = parse(policy).unwrap_or_else(|faults| panic!("{faults}"));
        let compiled = Compiled::new(&policy, &directory).unwrap();
        Self {
            compiled,
            directory,
        }
    }

    fn me(&self) -> Me {
        let node = &self.directory.nodes[&HUB];
        Me {
            id: HUB,
            name: node.name.clone(),
            key: NodeKey([0; 32]),
            addrs: node.addrs.clone(),
            routes: BTreeSet::new(),
            owner: node.owner.clone(),
            labels: self.compiled.labels(HUB),
        }
    }

    fn peer(&self, id: NodeId) -> Peer {
        let node = &self.directory.nodes[&id];
        Peer {
            id,
            name: node.name.clone(),
            key: NodeKey([1; 32]),
            addrs: node.addrs.clone(),
            routes: BTreeSet::new(),
            endpoints: Vec::new(),
            owner: node.owner.clone(),
            labels: self.compiled.labels(id),
            online: true,
            disco: None,
            home: None,
        }
    }

    fn peers(&self) -> BTreeMap<NodeId, Peer> {
        let seen = self.compiled.peers_of(HUB).into_iter();
        seen.map(|id| (id, self.peer(id))).collect()
    }

    fn lower(&self) -> Result<Acl, TooLarge> {
        let mut acl = Acl::default();
        acl.lower(&self.compiled.filter(HUB), &self.me(), &self.peers())?;
        Ok(acl)
    }
}

/// Numbers that look random and are the same everywhere (Steele, Lea, Flood: SplitMix).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    /// One to three of what `one` makes.
    fn some(&mut self, one: impl Fn(&mut Self) -> String) -> Vec<String> {
        (0..=self.below(3)).map(|_| one(self)).collect()
    }
}

fn quoted(texts: &[String]) -> String {
    let texts: Vec<String> = texts.iter().map(|text| format!("{text:?}")).collect();
    texts.join(", ")
}

fn user(number: u64) -> String {
    format!("u{number}@example.com")
}

/// 1,000 nodes, half of them users' (100 users in 40 groups), half with up to three of 40 tags;
/// 1,000 rules, each from up to three groups or tags to up to three tags, on up to three ports or
/// ranges of the whole number space.
fn random_rules() -> Hub {
    let mut random = Random(1);
    let tag = |random: &mut Random| format!("tag:t{}", random.below(40));
    let mut owners = vec!["tag:t0 tag:t1 tag:t2".to_owned()];
    for number in 1..1_000 {
        owners.push(match number % 2 {
            0 => user(random.below(100)),
            _ => random.some(tag).join(" "),
        });
    }
    let groups: Vec<String> = (0..40)
        .map(|group| {
            let members: Vec<String> = (0..10).map(|_| user(random.below(100))).collect();
            format!("\"group:g{group}\": [{}]", quoted(&members))
        })
        .collect();
    let tags: Vec<String> = (0..40).map(|tag| format!("\"tag:t{tag}\": []")).collect();
    let rule = |random: &mut Random| {
        let srcs = random.some(|random| match random.below(2) {
            0 => format!("group:g{}", random.below(40)),
            _ => tag(random),
        });
        let ports = random.some(|random| {
            let first = 1 + random.below(60_000);
            match random.below(4) {
                0 => format!("{first}-{}", first + random.below(2_000)),
                _ => first.to_string(),
            }
        });
        let ports = ports.join(",");
        let dsts = random.some(|random| format!("{}:{ports}", tag(random)));
        let protocol = ["", "tcp", "udp"][random.below(3) as usize];
        format!(
            r#"{{"action": "accept", "proto": "{protocol}", "src": [{}], "dst": [{}]}}"#,
            quoted(&srcs),
            quoted(&dsts)
        )
    };
    let rules: Vec<String> = (0..1_000).map(|_| rule(&mut random)).collect();
    let policy = format!(
        "{{\"tagOwners\": {{{}}}, \"groups\": {{{}}}, \"acls\": [{}]}}",
        tags.join(", "),
        groups.join(", "),
        rules.join(",\n")
    );
    Hub::new(&policy, &owners)
}

/// Users with a node each, and a rule for each that opens a port of the hub of its own, which
/// [`scattered`] does not open; before these stands the rule `shared`, at line 2.
fn distinct(count: u64, shared: &str) -> Hub {
    let mut owners = vec!["tag:hub".to_owned()];
    owners.extend((1..=count).map(user));
    let rule = |number: u64| {
        format!(
            r#"{{"action": "accept", "proto": "tcp", "src": ["{}"], "dst": ["tag:hub:{}"]}}"#,
            user(number),
            65_500 * (number % 1_000) / 1_000 + 10 + number / 1_000
        )
    };
    let rules: Vec<String> = (1..=count).map(rule).collect();
    let policy = format!(
        "{{\"tagOwners\": {{\"tag:hub\": []}}, \"acls\": [\n{shared}{}]}}",
        rules.join(",\n")
    );
    Hub::new(&policy, &owners)
}

/// A rule that opens 1,000 port ranges of the hub, none near another.
fn scattered(src: &str) -> String {
    let ports: Vec<String> = (0..1_000)
        .map(|number| 65_500 * number / 1_000)
        .map(|below| format!("{}-{}", below + 1, below + 3))
        .collect();
    format!(
        r#"{{"action": "accept", "src": ["{src}"], "dst": ["tag:hub:{}"]}},"#,
        ports.join(",")
    ) + "\n"
}

/// An administrator who may do everything, and 100 others who may use 1,000 port ranges.
fn admin_beside_ranges() -> Hub {
    let mut owners = vec!["tag:hub".to_owned(), "admin@example.com".to_owned()];
    owners.extend((0..100).map(user));
    let policy = format!(
        "{{\"tagOwners\": {{\"tag:hub\": []}}, \"acls\": [\n{}{}]}}",
        scattered("autogroup:member"),
        r#"{"action": "accept", "src": ["admin@example.com"], "dst": ["*:*"]}"#
    );
    Hub::new(&policy, &owners)
}

/// Entries of one table, and the kernel's bytes for each.
struct Weight {
    entries: usize,
    bytes: usize,
}

/// A hash map as `kernel/bpf/hashtab.c` makes it: every entry at once, a bucket for each and up to
/// the next power of two; with the room that the agent leaves.
fn hash<K, V>(entries: usize) -> Weight {
    const HEAD: usize = 48;
    const BUCKET: usize = 16;
    let room = entries + entries / 4 + 256;
    let entry = HEAD + size_of::<K>().next_multiple_of(8) + size_of::<V>().next_multiple_of(8);
    Weight {
        entries,
        bytes: room * entry + room.next_power_of_two() * BUCKET,
    }
}

/// Small arrays of lines, which take 32 KiB with their head.
fn slabs(entries: usize) -> Weight {
    let bytes = slabs_for(entries) * 32 * 1024;
    Weight { entries, bytes }
}

/// An array of lines, with room for what joins.
fn lines(entries: usize) -> Weight {
    let bytes = lines_for(entries) * 64;
    Weight { entries, bytes }
}

/// A trie allocates as it grows: a node for each prefix, and at most one more where two part.
fn trie<K, V>(entries: usize) -> Weight {
    const HEAD: usize = 40;
    let node = (HEAD + size_of::<K>() + size_of::<V>()).next_multiple_of(32);
    Weight {
        entries,
        bytes: entries * (node + 64),
    }
}

/// A row of the page.
fn row(name: &str, acl: &Acl) -> String {
    let tables = acl.tables();
    let weights = [
        slabs(tables.identities.len()),
        trie::<PrefixKey, Identity>(tables.prefixes.len()),
        lines(tables.pairs.len()),
        hash::<PortsKey, Ports>(tables.ports.len()),
        hash::<PageKey, Page>(tables.pages.len()),
    ];
    let kib = |bytes: usize| bytes.div_ceil(1024);
    let cells: Vec<String> = weights
        .iter()
        .map(|weight| {
            format!(
                "{} / {}",
                thousands(weight.entries),
                thousands(kib(weight.bytes))
            )
        })
        .collect();
    let total: usize = weights.iter().map(|weight| weight.bytes).sum();
    // The line of the peer's address; where that does not say it all, the pair and the port set, and
    // its page where ports are scattered.
    let look_ups =
        1 + 2 * usize::from(!tables.ports.is_empty()) + usize::from(!tables.pages.is_empty());
    format!(
        "| {name} | {} | {} | {look_ups} |\n",
        cells.join(" | "),
        thousands(kib(total))
    )
}

fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Users that a rule each tells apart, all of them under one rule of scattered ports: as many as
/// fit, and one more.
fn last_and_first_refused() -> (Acl, TooLarge) {
    let shared = scattered("autogroup:member");
    // Its pages, of TCP and of UDP, once for each.
    let fits = MAX_PAGES as u64 / (2 * 128);
    let last = distinct(fits, &shared).lower().unwrap();
    assert_eq!(last.tables().pages.len(), MAX_PAGES);
    (last, distinct(fits + 1, &shared).lower().unwrap_err())
}

#[test]
fn the_page_has_the_figures() {
    let mut page = String::from(
        "| policy | addresses | prefixes | pairs | port sets | pages | KiB | look-ups |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    let (last, refused) = last_and_first_refused();
    page += &row(
        "1,000 random rules, 1,000 nodes",
        &random_rules().lower().unwrap(),
    );
    page += &row(
        "10,000 peers, a rule and a port for each",
        &distinct(10_000, "").lower().unwrap(),
    );
    page += &row(
        "`admin -> *:*` beside 1,000 port ranges for 100 others",
        &admin_beside_ranges().lower().unwrap(),
    );
    page += &row(
        "1,000 port ranges for 512 peers that a rule each tells apart: the last that fits",
        &last,
    );
    page += &format!("\nWith 513 of them it is refused:\n\n```text\n{refused}\n```\n");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ARCHITECTURE.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (begin, end) = ("<!-- tables begin -->\n", "<!-- tables end -->");
    let (head, rest) = text.split_once(begin).unwrap();
    let (stands, tail) = rest.split_once(end).unwrap();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, format!("{head}{begin}\n{page}\n{end}{tail}")).unwrap();
    } else {
        assert_eq!(stands.trim(), page.trim(), "UPDATE=1 writes it anew");
    }
}

#[test]
fn a_refusal_names_the_rule_that_must_change_not_the_one_with_most_pairs() {
    let mut acl = distinct(3, "").lower().unwrap();
    let before = acl.tables().clone();
    let large = distinct(513, &scattered("autogroup:member"));
    let refused = acl
        .lower(&large.compiled.filter(HUB), &large.me(), &large.peers())
        .unwrap_err();
    assert_eq!(*acl.tables(), before, "the policy before stays");
    assert_eq!((refused.table, refused.limit), (Table::Pages, MAX_PAGES));
    // Line 2 is the shared rule, with two protocols; the others open one port of one.
    assert_eq!(
        (refused.rules[0].line, refused.rules[0].entries),
        (2, 513 * 256)
    );
    assert_eq!((refused.rules[1].line, refused.rules[1].entries), (3, 1));

    // Everybody may use one port, by the first rule; the second, for most of them, is what costs.
    let most: Vec<String> = (1..=520).map(user).collect();
    let many = format!(
        r#"{{"action": "accept", "src": ["autogroup:member"], "dst": ["tag:hub:22"]}},{}{}"#,
        "\n",
        scattered(&most.join("\", \"")),
    );
    let refused = distinct(700, &many).lower().unwrap_err();
    assert_eq!(
        (refused.rules[0].line, refused.rules[0].entries),
        (3, 520 * 256)
    );
    assert_eq!(
        (refused.rules[1].line, refused.rules[1].entries),
        (2, 520 * 2)
    );
}

#[test]
fn one_of_ten_thousand_that_joins_adds_its_own_addresses_and_what_is_new_about_it() {
    let hub = distinct(10_000, "");
    let mut peers = hub.peers();
    let late = NodeId(10_000);
    let (mut acl, filter, me) = (Acl::default(), hub.compiled.filter(HUB), hub.me());
    let joins = |peers: &BTreeMap<NodeId, Peer>, acl: &mut Acl| {
        let Change::InPlace(patch) = acl.lower(&filter, &me, peers).unwrap() else {
            panic!("a join is no swap");
        };
        patch
    };
    let peer = peers.remove(&late).unwrap();
    acl.lower(&filter, &me, &peers).unwrap();
    // Its two addresses, and its pair with the hub: no peer is like it.
    peers.insert(late, peer.clone());
    let patch = joins(&peers, &mut acl);
    assert_eq!(
        (
            patch.identities.len(),
            patch.pairs.len(),
            patch.ports.len(),
            patch.entries()
        ),
        (2, 1, 0, 3)
    );
    // Another node of a user who has one: its addresses.
    let mut twin = peer;
    twin.id = NodeId(20_000);
    twin.addrs = vec![
        "100.127.0.1".parse().unwrap(),
        "fd7a::ffff:1".parse().unwrap(),
    ];
    peers.insert(twin.id, twin);
    let patch = joins(&peers, &mut acl);
    assert_eq!((patch.identities.len(), patch.entries()), (2, 2));
}
