//! The policy language as a user meets it: text in, filters or faults out.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use proto::filter::{Direction, Filter, Initiation, Label, Rule, Selector};
use proto::id::NodeId;
use proto::net::{Prefix, Protocol};
use proto::netmap::Owner;
use proto::policy::{
    Compiled, Directory, DirectoryNode, DirectoryUser, Flow, check_write, explain, parse,
    read_topology, run_tests,
};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

fn node(name: &str, addr: &str, owner: Owner, routes: &[&str]) -> DirectoryNode {
    let routes: BTreeSet<Prefix> = routes.iter().map(|route| route.parse().unwrap()).collect();
    DirectoryNode {
        name: name.to_owned(),
        owner,
        addrs: vec![addr.parse().unwrap()],
        routes: routes.clone(),
        advertised: routes,
    }
}

fn user(login: &str) -> Owner {
    Owner::User(login.to_owned())
}

fn tags(tags: &[&str]) -> Owner {
    Owner::Tags(tags.iter().map(|tag| (*tag).to_owned()).collect())
}

/// Ana has two nodes, bob one; a web and a db server; two routers with a LAN each.
fn directory() -> Directory {
    let nodes = [
        node("ana-laptop", ANA, user("ana@example.com"), &[]),
        node("ana-phone", PHONE, user("ana@example.com"), &[]),
        node("bob-laptop", BOB, user("bob@example.com"), &[]),
        node("web", WEB, tags(&["tag:web"]), &[]),
        node("db", DB, tags(&["tag:db"]), &[]),
        node(
            "east",
            "100.64.0.6",
            tags(&["tag:router"]),
            &["10.1.0.0/16"],
        ),
        node(
            "west",
            "100.64.0.7",
            tags(&["tag:router"]),
            &["10.2.0.0/16"],
        ),
    ];
    let users = ["ana@example.com", "bob@example.com"].map(|login| DirectoryUser {
        login: login.to_owned(),
        roles: BTreeSet::new(),
    });
    let numbered = nodes.into_iter().enumerate();
    Directory {
        v4: "100.64.0.0/10".parse().unwrap(),
        v6: "fd7a::/48".parse().unwrap(),
        users: users.to_vec(),
        nodes: numbered
            .map(|(n, node)| (NodeId(n as u64 + 1), node))
            .collect(),
    }
}

const ANA: &str = "100.64.0.1";
const PHONE: &str = "100.64.0.2";
const BOB: &str = "100.64.0.3";
const WEB: &str = "100.64.0.4";
const DB: &str = "100.64.0.5";
const EAST_LAN: &str = "10.1.0.9";
const WEST_LAN: &str = "10.2.0.9";

fn compile(text: &str) -> Compiled {
    compile_for(text, &directory())
}

fn compile_for(text: &str, directory: &Directory) -> Compiled {
    let policy = parse(text).unwrap_or_else(|faults| panic!("{faults}"));
    Compiled::new(&policy, directory).unwrap()
}

fn labels_of(compiled: &Compiled, directory: &Directory, addr: IpAddr) -> BTreeSet<Label> {
    let owner = directory
        .nodes
        .iter()
        .find(|(_, node)| node.addrs.contains(&addr));
    owner.map_or_else(BTreeSet::new, |(id, _)| compiled.labels(*id))
}

/// The node that a packet to or from `addr` passes: its owner, or the router of its LAN.
fn holder(directory: &Directory, addr: IpAddr) -> Option<NodeId> {
    let holds = |node: &DirectoryNode| {
        node.addrs.contains(&addr) || node.routes.iter().any(|route| route.contains(addr))
    };
    directory
        .nodes
        .iter()
        .find(|(_, node)| holds(node))
        .map(|(id, _)| *id)
}

/// The verdicts of the sender and the receiver on a TCP connection.
fn verdicts(compiled: &Compiled, src: &str, dst: &str, port: u16) -> (bool, bool) {
    let directory = directory();
    let (src, dst): (IpAddr, IpAddr) = (src.parse().unwrap(), dst.parse().unwrap());
    let initiation = Initiation {
        src,
        src_labels: &labels_of(compiled, &directory, src),
        dst,
        dst_labels: &labels_of(compiled, &directory, dst),
        protocol: Protocol::TCP,
        port,
    };
    let at = |addr, direction| {
        let holder = holder(&directory, addr);
        let filter = holder.map_or_else(Filter::default, |id| compiled.filter(id));
        filter.allows(direction, &initiation).is_some()
    };
    (at(src, Direction::Egress), at(dst, Direction::Ingress))
}

type Attempt<'a> = (&'a str, &'a str, u16);

#[track_caller]
fn check(text: &str, allowed: &[Attempt<'_>], denied: &[Attempt<'_>]) {
    let compiled = compile(text);
    for (src, dst, port) in allowed {
        let both = verdicts(&compiled, src, dst, *port);
        assert_eq!(both, (true, true), "{src} -> {dst}:{port}");
    }
    for (src, dst, port) in denied {
        let both = verdicts(&compiled, src, dst, *port);
        assert_eq!(both, (false, false), "{src} -> {dst}:{port}");
    }
}

#[test]
fn users_groups_tags_and_ports_allow_what_they_say_and_nothing_back() {
    check(
        r#"{
          // comments and trailing commas are fine
          "groups": {"group:dev": ["ana@example.com"]},
          "tagOwners": {"tag:web": [], "tag:db": []},
          "acls": [
            {"action": "accept", "src": ["group:dev"], "dst": ["tag:web:80,443"]},
            {"action": "accept", "src": ["bob@example.com"], "dst": ["tag:web:8000-8100"]},
            {"action": "accept", "src": ["tag:web"], "dst": ["tag:db:5432"]},
          ],
        }"#,
        &[
            (ANA, WEB, 80),
            (PHONE, WEB, 443),
            (BOB, WEB, 8050),
            (WEB, DB, 5432),
        ],
        &[
            (ANA, WEB, 22),
            (BOB, WEB, 80),
            (WEB, ANA, 80),
            (ANA, DB, 5432),
            (DB, WEB, 80),
        ],
    );
}

#[test]
fn hosts_prefixes_ranges_and_routes_are_named_by_address() {
    check(
        r#"{"hosts": {"lan": "10.1.0.0/16", "web": "100.64.0.4"},
            "ipsets": {"ipset:west": ["10.2.0.0/16", "remove 10.2.0.9"]},
            "acls": [
              {"action": "accept", "src": ["lan"], "dst": ["web:80"]},
              {"action": "accept", "src": ["100.64.0.1-100.64.0.2"], "dst": ["10.2.0.0/24:22"]},
              {"action": "accept", "src": ["100.64.0.3"], "dst": ["ipset:west:22"]}]}"#,
        &[
            (EAST_LAN, WEB, 80),
            (ANA, WEST_LAN, 22),
            (PHONE, WEST_LAN, 22),
            (BOB, "10.2.0.8", 22),
        ],
        &[
            (BOB, WEST_LAN, 22),
            (WEST_LAN, WEB, 80),
            (EAST_LAN, WEST_LAN, 22),
        ],
    );
}

#[test]
fn an_ipv6_address_or_prefix_may_stand_in_brackets() {
    let rules = |dst: &str| {
        let text = format!(
            r#"{{"acls": [{{"action": "accept", "src": ["100.64.0.1"], "dst": ["{dst}"]}}]}}"#
        );
        parse(&text).map(|policy| Compiled::new(&policy, &directory()).unwrap())
    };
    for (bracketed, plain) in [
        ("[fd7a::7]:443", "fd7a::7:443"),
        ("[fd7a:0:0:1::]/64:80,443", "fd7a:0:0:1::/64:80,443"),
    ] {
        let [one, other] = [bracketed, plain].map(|dst| rules(dst).unwrap());
        for id in directory().nodes.keys() {
            assert_eq!(one.filter(*id), other.filter(*id), "{bracketed}");
        }
    }
    for wrong in [
        "[fd7a::7]x:443",
        "[fd7a::7:443",
        "[fd7a::7]/200:443",
        "[]:443",
    ] {
        assert!(rules(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn self_means_the_nodes_of_the_same_user() {
    check(
        r#"{"acls": [
            {"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*"]}]}"#,
        &[(ANA, PHONE, 22), (PHONE, ANA, 1)],
        &[
            (ANA, BOB, 22),
            (ANA, WEB, 22),
            (WEB, DB, 22),
            (EAST_LAN, ANA, 22),
        ],
    );
}

#[test]
fn a_star_is_every_node_and_every_approved_route() {
    let all = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;
    check(
        all,
        &[
            (ANA, WEB, 1),
            (EAST_LAN, WEST_LAN, 1),
            (WEB, EAST_LAN, 65535),
        ],
        &[],
    );
    assert_eq!(verdicts(&compile(all), "8.8.8.8", WEB, 80), (false, false));
}

#[test]
fn via_opens_a_route_only_through_the_tagged_router() {
    let text = r#"{"tagOwners": {"tag:east": []},
        "grants": [{"src": ["*"], "dst": ["10.0.0.0/8"], "ip": ["tcp:22"], "via": ["tag:east"]}]}"#;
    let mut directory = directory();
    directory.nodes.get_mut(&NodeId(6)).unwrap().owner = tags(&["tag:east"]);
    let compiled = compile_for(text, &directory);
    assert_eq!(compiled.filter(NodeId(6)).ingress.len(), 1);
    assert!(compiled.filter(NodeId(7)).ingress.is_empty());
    assert!(compiled.sees(NodeId(1), NodeId(6)) && !compiled.sees(NodeId(1), NodeId(4)));
}

#[test]
fn via_opens_nothing_but_routes() {
    let text = r#"{"tagOwners": {"tag:router": []},
        "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"], "via": ["tag:router"]}]}"#;
    check(text, &[(ANA, EAST_LAN, 22)], &[]);
    let compiled = compile(text);
    assert_eq!(verdicts(&compiled, ANA, "100.64.0.6", 22), (false, false));
}

#[test]
fn nothing_written_is_nothing_allowed() {
    for text in ["{}", r#"{"acls": []}"#, r#"{"grants": [], "groups": {}}"#] {
        let compiled = compile(text);
        for id in directory().nodes.keys() {
            let filter = compiled.filter(*id);
            assert!(filter.ingress.is_empty() && filter.egress.is_empty());
            assert!(compiled.peers_of(*id).is_empty());
        }
    }
}

#[test]
fn a_policy_without_access_rules_may_not_be_set() {
    let fault = check_write(&parse(r#"{"groups": {}}"#).unwrap()).unwrap_err();
    assert!(fault.hint.contains("\"acls\": []"), "{fault}");
    check_write(&parse(r#"{"acls": []}"#).unwrap()).unwrap();
    check_write(&parse(r#"{"grants": []}"#).unwrap()).unwrap();
}

#[test]
fn a_node_that_joins_changes_no_other_filter() {
    let text = r#"{"groups": {"group:dev": ["ana@example.com", "carl@example.com"]},
        "tagOwners": {"tag:web": []},
        "acls": [{"action": "accept", "src": ["group:dev", "*"], "dst": ["tag:web:80"]},
                 {"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*"]}]}"#;
    let before_directory = directory();
    let mut after_directory = before_directory.clone();
    let joined = node("ana-tablet", "100.64.0.9", user("ana@example.com"), &[]);
    after_directory.nodes.insert(NodeId(99), joined);
    let (before, after) = (compile(text), compile_for(text, &after_directory));
    for id in before_directory.nodes.keys() {
        assert_eq!(before.filter(*id), after.filter(*id));
        assert_eq!(before.labels(*id), after.labels(*id));
    }
    assert!(after.sees(NodeId(99), NodeId(1)) && after.sees(NodeId(99), NodeId(4)));
}

#[test]
fn sees_is_symmetric_and_agrees_with_peers_of() {
    let text = r#"{"tagOwners": {"tag:web": [], "tag:db": [], "tag:router": []},
        "acls": [{"action": "accept", "src": ["bob@example.com"], "dst": ["10.1.0.0/24:22"]},
                 {"action": "accept", "src": ["10.2.0.0/16"], "dst": ["tag:db:5432"]},
                 {"action": "accept", "src": ["ana@example.com"], "dst": ["autogroup:self:*"]}]}"#;
    let compiled = compile(text);
    let mut pairs = BTreeSet::new();
    for a in directory().nodes.keys() {
        let peers = compiled.peers_of(*a);
        for b in directory().nodes.keys() {
            assert_eq!(compiled.sees(*a, *b), compiled.sees(*b, *a));
            assert_eq!(compiled.sees(*a, *b), peers.contains(b));
            if a < b && peers.contains(b) {
                pairs.insert((a.0, b.0));
            }
        }
    }
    assert_eq!(pairs, BTreeSet::from([(1, 2), (3, 6), (5, 7)]));
}

#[test]
fn a_slash_eight_or_a_hundred_thousand_hosts_are_not_expanded() {
    let hosts: Vec<String> = (0..100_000u32)
        .map(|n| {
            format!(
                "\"h{n}\": \"10.{}.{}.{}\"",
                n >> 16,
                (n >> 8) & 255,
                n & 255
            )
        })
        .collect();
    let rules: Vec<String> = (1..=1_000)
        .map(|n| format!(r#"{{"action":"accept","src":["h{n}"],"dst":["10.0.0.0/8:{n}"]}}"#))
        .collect();
    let (hosts, rules) = (hosts.join(","), rules.join(","));
    let text = format!("{{\"hosts\": {{{hosts}}}, \"acls\": [{rules}]}}");
    let filter = compile(&text).filter(NodeId(6));
    let listed = |rule: &Rule| rule.srcs.len() + rule.dsts.len();
    assert_eq!(filter.ingress.iter().map(listed).sum::<usize>(), 2_000);
    let slash_eight = Selector::Prefix("10.0.0.0/8".parse().unwrap());
    assert!(filter.ingress.iter().all(|rule| rule.dsts == [slash_eight]));
}

#[test]
fn rules_carry_the_line_of_their_entry() {
    let text = "{\n  \"acls\": [\n    {\"action\": \"accept\", \"src\": [\"*\"],\n     \
        \"dst\": [\"*:1\"]},\n    {\"action\": \"accept\", \"src\": [\"*\"], \"dst\": [\"*:2\"]}]}";
    let filter = compile(text).filter(NodeId(1));
    let line = |rule: &Rule| (rule.index, rule.line);
    let lines: BTreeMap<u32, u32> = filter.ingress.iter().map(line).collect();
    assert_eq!(lines, BTreeMap::from([(0, 3), (1, 5)]));
}

#[test]
fn all_faults_are_found_in_one_pass_with_their_places() {
    let text = r#"{
  "groups": {"group:dev": ["ana@example.com"], "group:all": ["group:dev"]},
  "tagOwners": {"tag:web": ["group:dve"]},
  "acl": [],
  "acls": [
    {"action": "deny", "src": ["tag:wbe"], "dst": ["tag:web:ssh"]},
    {"action": "accept", "src": ["autogroup:membr"], "dst": ["web"]},
  ],
}"#;
    let faults = parse(text).unwrap_err();
    let items = faults.items.iter();
    let said: Vec<String> = items
        .map(|fault| format!("{}:{}", fault.line, fault.code.as_str()))
        .collect();
    assert_eq!(
        said,
        [
            "2:nested_group",
            "3:unknown_name",
            "4:unknown_field",
            "6:bad_value",
            "6:unknown_name",
            "6:bad_port",
            "7:bad_selector",
            "7:bad_port"
        ],
        "{faults}"
    );
    let rendered = faults.render("office.hujson");
    for expected in [
        "office.hujson:4:3",
        "write `acls`",
        "write `group:dev`",
        "write `tag:web`",
    ] {
        assert!(rendered.contains(expected), "{expected} in\n{rendered}");
    }
}

const TOPOLOGY: &str = r#"{
  "users": [{"id": 1, "name": "ana", "email": "ana@example.com"},
            {"id": 2, "name": "bob", "email": "bob@example.com"}],
  "nodes": {
    "laptop": {"user": "ana", "ipv4": "100.64.0.1", "ipv6": "fd7a:115c:a1e0::1"},
    "web": {"tags": ["tag:web"], "ipv4": "100.64.0.2", "ipv6": "fd7a:115c:a1e0::2"},
    "router": {"tags": ["tag:router"], "ipv4": "100.64.0.3",
               "routable_ips": ["10.0.0.0/8"], "approved_routes": ["10.0.0.0/8"]}}}"#;

/// Runs the policy's own cases; the first failure's message, or nothing.
fn own_tests(rules: &str, cases: &str) -> Option<String> {
    let text = format!(
        r#"{{"groups": {{"group:dev": ["ana@example.com", "bob@example.com"], "group:none": []}},
            "hosts": {{"lan": "10.0.0.0/8", "printer": "10.1.2.3"}},
            "tagOwners": {{"tag:web": [], "tag:db": [], "tag:router": []}},
            "acls": [{rules}], "ssh": [
              {{"action": "check", "src": ["group:dev"], "dst": ["tag:web"], "users": ["root"]}},
              {{"action": "accept", "src": ["ana@example.com"], "dst": ["autogroup:self"],
               "users": ["autogroup:nonroot"]}}],
            {cases}}}"#
    );
    let policy = parse(&text).unwrap_or_else(|faults| panic!("{faults}"));
    let faults = run_tests(&policy, &read_topology(TOPOLOGY).unwrap()).err()?;
    Some(faults.to_string())
}

const RULES: &str = r#"{"action": "accept", "src": ["group:dev"], "dst": ["tag:web:80", "printer:631"]},
    {"action": "accept", "proto": "udp", "src": ["tag:web"], "dst": ["tag:db:53"]}"#;

#[test]
fn tests_hold_for_users_and_tags_without_a_node_yet() {
    let passing = r#""tests": [
        {"src": "bob@example.com", "accept": ["tag:web:80", "printer:631"], "deny": ["tag:db:53"]},
        {"src": "tag:web", "accept": ["tag:db:53"], "deny": ["group:dev:80"]},
        {"src": "tag:web", "proto": "tcp", "deny": ["tag:db:53"]},
        {"src": "group:dev", "accept": ["100.64.0.2:80"], "deny": ["100.64.0.2:81"]}]"#;
    assert_eq!(own_tests(RULES, passing), None);
}

#[test]
fn failing_tests_name_the_rule_that_decided() {
    let case = |case: &str| own_tests(RULES, &format!("\"tests\": [{case}]"));
    let allowed = case(r#"{"src": "ana@example.com", "deny": ["tag:web:80"]}"#).unwrap();
    assert!(
        allowed.contains("allowed by acls[0]") && allowed.contains("group:dev"),
        "{allowed}"
    );
    let denied = case(r#"{"src": "ana@example.com", "accept": ["tag:web:81"]}"#).unwrap();
    assert!(denied.contains("it allows ports 80, not 81"), "{denied}");
    for shape in [
        r#"{"src": "ana@example.com"}"#,
        r#"{"accept": ["tag:web:80"]}"#,
        r#"{"src": "zoe@example.com", "deny": ["tag:web:80"]}"#,
        r#"{"src": "group:none", "deny": ["tag:web:80"]}"#,
        r#"{"src": "ana@example.com", "deny": ["lan:80"]}"#,
        r#"{"src": "ana@example.com", "deny": ["10.0.0.0/8:80"]}"#,
        r#"{"src": "ana@example.com", "deny": ["tag:web:*"]}"#,
        r#"{"src": "ana@example.com", "deny": ["tag:web:1-9"]}"#,
        r#"{"src": "ana@example.com", "deny": ["tag:wep:80"]}"#,
        r#"{"src": "ana@example.com", "proto": "icmp", "deny": ["tag:web:80"]}"#,
        r#"{"src": "ana@example.com", "deny": ["autogroup:internet:80"]}"#,
    ] {
        assert!(case(shape).is_some(), "{shape}");
    }
}

#[test]
fn ssh_tests_tell_accept_check_and_deny_apart() {
    let case = |case: &str| own_tests(RULES, &format!("\"sshTests\": [{case}]"));
    for passing in [
        r#"{"src": "bob@example.com", "dst": ["tag:web"], "check": ["root"], "deny": ["www"]}"#,
        r#"{"src": "ana@example.com", "dst": ["autogroup:self"], "accept": ["ana"]}"#,
        r#"{"src": "bob@example.com", "dst": ["autogroup:self"], "deny": ["bob"]}"#,
    ] {
        assert_eq!(case(passing), None, "{passing}");
    }
    for failing in [
        r#"{"src": "bob@example.com", "dst": ["tag:web"], "accept": ["www"]}"#,
        r#"{"src": "ana@example.com", "dst": ["autogroup:self"], "check": ["ana"]}"#,
        r#"{"src": "ana@example.com", "dst": ["autogroup:self"], "accept": ["root"]}"#,
        r#"{"src": "ana@example.com", "dst": ["tag:web"], "deny": ["root"]}"#,
        r#"{"src": "ana@example.com", "dst": ["tag:web:22"], "deny": ["www"]}"#,
        r#"{"src": "ana@example.com", "dst": ["tag:web"]}"#,
        r#"{"src": "ana@example.com", "dst": [], "deny": ["www"]}"#,
    ] {
        assert!(case(failing).is_some(), "{failing}");
    }
}

#[test]
fn explain_names_the_rule_or_the_nearest_ones() {
    let policy = r#"{"tagOwners": {"tag:web": []}, "acls": [
        {"action": "accept", "src": ["ana@example.com"], "dst": ["tag:web:80"]}]}"#;
    let (policy, directory) = (parse(policy).unwrap(), read_topology(TOPOLOGY).unwrap());
    let ask = |src: &str, dst: &str, port| {
        let flow = Flow {
            src: src.parse().unwrap(),
            dst: dst.parse().unwrap(),
            protocol: Protocol::TCP,
            port,
        };
        explain(&policy, &directory, &flow)
    };
    assert_eq!(
        ask("100.64.0.1", "100.64.0.2", 80).sentences(),
        "allowed by acls[0] at line 2: source ana@example.com, destination tag:web:80"
    );
    let denied = ask("100.64.0.1", "100.64.0.2", 22);
    assert!(
        !denied.allowed && denied.near[0].why.contains("ports 80"),
        "{denied:?}"
    );
    let back = ask("fd7a:115c:a1e0::2", "fd7a:115c:a1e0::1", 80);
    assert_eq!(back.near[0].why, "the source is none of its `src`");
}

#[test]
fn ipsets_that_contain_themselves_or_nest_without_end_are_refused() {
    let chain = |last: &str| {
        let links = (0..20_000).map(|n| format!("\"ipset:s{n}\": [\"ipset:s{}\"]", n + 1));
        let links: Vec<String> = links.collect();
        format!(
            "{{\"ipsets\": {{{}, \"ipset:s20000\": [{last}]}}}}",
            links.join(",")
        )
    };
    assert!(parse(&chain("\"10.0.0.0/8\"")).is_err());
    assert!(parse(&chain("\"ipset:s0\"")).is_err());
    assert!(parse(r#"{"ipsets": {"ipset:a": ["ipset:a"]}}"#).is_err());
    parse(r#"{"ipsets": {"ipset:a": ["ipset:b", "remove 10.0.0.1"], "ipset:b": ["10.0.0.0/8"]}}"#)
        .unwrap();
}

/// Entries that the language refuses, by section.
const REFUSED: &[(&str, &str)] = &[
    (
        "acls",
        r#"{"action": "accept", "src": ["*"], "dst": ["*:0"]}"#,
    ),
    (
        "acls",
        r#"{"action": "accept", "proto": "gre", "src": ["*"], "dst": ["*:80"]}"#,
    ),
    (
        "acls",
        r#"{"action": "accept", "proto": "*", "src": ["*"], "dst": ["*:*"]}"#,
    ),
    (
        "acls",
        r#"{"action": "accept", "src": ["autogroup:internet"], "dst": ["*:*"]}"#,
    ),
    (
        "acls",
        r#"{"action": "accept", "src": ["*"], "dst": ["autogroup:danger-all:*"]}"#,
    ),
    (
        "acls",
        r#"{"action": "accept", "src": ["tag:web"], "dst": ["autogroup:self:*"]}"#,
    ),
    (
        "grants",
        r#"{"src": ["*"], "dst": ["autogroup:self"], "ip": ["*"]}"#,
    ),
    (
        "grants",
        r#"{"src": ["*"], "dst": ["0.0.0.0/0"], "ip": ["*"]}"#,
    ),
    (
        "grants",
        r#"{"src": ["*"], "dst": ["*"], "ip": ["tcp:80:81"]}"#,
    ),
    (
        "grants",
        r#"{"src": ["*"], "dst": ["*"], "ip": ["*"], "via": ["group:dev"]}"#,
    ),
    (
        "grants",
        r#"{"src": ["*"], "dst": ["*"], "app": {"tailscale.com/cap/funnel": []}}"#,
    ),
    (
        "grants",
        r#"{"src": ["*"], "dst": ["autogroup:internet"], "app": {"a.b/c": [{}]}}"#,
    ),
    (
        "ssh",
        r#"{"action": "accept", "src": ["*"], "dst": ["tag:web"], "users": ["root"]}"#,
    ),
    (
        "ssh",
        r#"{"action": "accept", "src": ["group:dev"], "dst": ["*"], "users": ["root"]}"#,
    ),
    (
        "ssh",
        r#"{"action": "accept", "src": ["group:dev"], "dst": ["lan"], "users": ["a"]}"#,
    ),
    (
        "ssh",
        r#"{"action": "accept", "src": ["group:dev"], "dst": ["tag:web"], "users": []}"#,
    ),
    (
        "ssh",
        r#"{"action": "accept", "src": ["tag:web"], "dst": ["autogroup:self"],
                    "users": ["a"]}"#,
    ),
    (
        "ssh",
        r#"{"action": "accept", "src": ["group:dev"], "dst": ["ana@example.com"],
                    "users": ["a"]}"#,
    ),
    (
        "ssh",
        r#"{"action": "check", "checkPeriod": "169h", "src": ["group:dev"],
                    "dst": ["tag:web"], "users": ["a"]}"#,
    ),
    (
        "ssh",
        r#"{"action": "accept", "checkPeriod": "1h", "src": ["group:dev"],
                    "dst": ["tag:web"], "users": ["a"]}"#,
    ),
    (
        "nodeAttrs",
        r#"{"target": ["autogroup:self"], "attr": ["x"]}"#,
    ),
];

#[test]
fn the_example_may_be_set_as_it_stands() {
    let text = include_str!("../../packaging/examples/small-office.hujson");
    let policy = parse(text).unwrap_or_else(|faults| panic!("{faults}"));
    check_write(&policy).unwrap();
    assert_eq!(policy.text(), text, "comments and layout are kept");
}

#[test]
fn refusals_of_the_language() {
    let section = |name: &str, entry: &str| {
        format!(
            r#"{{"groups": {{"group:dev": ["ana@example.com"]}}, "hosts": {{"lan": "10.0.0.0/8"}},
                "tagOwners": {{"tag:web": []}}, "{name}": [{entry}]}}"#
        )
    };
    for (name, entry) in REFUSED {
        assert!(parse(&section(name, entry)).is_err(), "{name}: {entry}");
    }
    let whole = r#"{"action": "check", "checkPeriod": "168h", "src": ["group:dev"],
        "dst": ["tag:web"], "users": [" root", "localpart:*@example.com"]}"#;
    parse(&section("ssh", whole)).unwrap();
}
