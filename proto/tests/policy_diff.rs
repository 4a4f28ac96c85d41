//! What people and programs are told about a change of policy. That it is exact is held in
//! `policy_properties.rs`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use proto::policy::{Compiled, Diff, diff, parse, read_topology};

/// Ana has two nodes and bob one; two web servers and a database; a router and an exit node.
const NETWORK: &str = r#"{
  "users": [{"id": 1, "name": "ana", "email": "ana@example.com"},
            {"id": 2, "name": "bob", "email": "bob@example.com"}],
  "nodes": {
    "laptop": {"user": "ana", "ipv4": "100.64.0.1", "ipv6": "fd7a:115c:a1e0::1"},
    "phone": {"user": "ana", "ipv4": "100.64.0.2", "ipv6": "fd7a:115c:a1e0::2"},
    "desk": {"user": "bob", "ipv4": "100.64.0.3", "ipv6": "fd7a:115c:a1e0::3"},
    "web-1": {"tags": ["tag:web"], "ipv4": "100.64.0.4", "ipv6": "fd7a:115c:a1e0::4"},
    "web-2": {"tags": ["tag:web"], "ipv4": "100.64.0.5", "ipv6": "fd7a:115c:a1e0::5"},
    "db": {"tags": ["tag:db"], "ipv4": "100.64.0.6", "ipv6": "fd7a:115c:a1e0::6"},
    "site": {"tags": ["tag:site"], "ipv4": "100.64.0.7",
             "routable_ips": ["10.1.0.0/16"], "approved_routes": ["10.1.0.0/16"]},
    "exit": {"tags": ["tag:exit"], "ipv4": "100.64.0.8", "ipv6": "fd7a:115c:a1e0::8",
             "routable_ips": ["0.0.0.0/0", "::/0"], "approved_routes": ["0.0.0.0/0", "::/0"]}
  }
}"#;

fn between(old: &str, new: &str) -> Diff {
    let directory = read_topology(NETWORK).unwrap();
    let compiled = |rules: &str| {
        let text = format!(
            r#"{{"tagOwners": {{"tag:web": [], "tag:db": [], "tag:site": [], "tag:exit": []}},
                "groups": {{"group:staff": ["ana@example.com", "bob@example.com"]}},
                "acls": [{rules}]}}"#
        );
        let policy = parse(&text).unwrap_or_else(|faults| panic!("{faults}"));
        Compiled::new(&policy, &directory).unwrap()
    };
    diff(&compiled(old), &compiled(new), &directory).unwrap()
}

#[track_caller]
fn check(old: &str, new: &str, told: &str) {
    assert_eq!(between(old, new).to_string(), told);
}

const STAFF_TO_WEB: &str =
    r#"{"action": "accept", "proto": "tcp", "src": ["group:staff"], "dst": ["tag:web:443"]}"#;

#[test]
fn the_same_reach_in_other_words_changes_nothing() {
    let in_two = r#"{"action": "accept", "proto": "tcp", "src": ["bob@example.com"],
                     "dst": ["tag:web:443"]},
                    {"action": "accept", "proto": "6", "src": ["ana@example.com"],
                     "dst": ["tag:web:400-500"]},
                    {"action": "accept", "proto": "tcp", "src": ["bob@example.com"],
                     "dst": ["tag:web:400-442,444-500"]}"#;
    let wider = STAFF_TO_WEB.replace(":443", ":400-500");
    check(&wider, in_two, "nothing changes for anybody\n");
}

#[test]
fn gains_and_losses_stand_by_who_gains_and_loses() {
    check(
        STAFF_TO_WEB,
        r#"{"action": "accept", "proto": "tcp", "src": ["ana@example.com"], "dst": ["tag:web:443"]},
           {"action": "accept", "proto": "tcp", "src": ["tag:web"], "dst": ["tag:db:5432"]},
           {"action": "accept", "src": ["tag:web"], "dst": ["10.1.2.0/24:80,8000-8010"]},
           {"action": "accept", "proto": "icmp", "src": ["tag:db"], "dst": ["10.1.3.3:*"]}"#,
        "db\n\
        \x20 + may reach 10.1.3.3 on icmp\n\
         desk\n\
        \x20 - may no longer reach tag:web (2 nodes) on tcp 443\n\
         tag:web (2 nodes)\n\
        \x20 + may reach db on tcp 5432\n\
        \x20 + may reach 10.1.2.0/24 on tcp+udp 80,8000-8010; icmp+ipv6-icmp\n",
    );
}

#[test]
fn a_rule_for_ones_own_nodes_is_one_line_for_everybody() {
    let anybody = r#"{"action": "accept", "proto": "tcp", "src": ["autogroup:member"],
                      "dst": ["autogroup:member:*"]}"#;
    let own = anybody.replace("autogroup:member:*", "autogroup:self:*");
    check(
        anybody,
        &own,
        "autogroup:member (3 nodes)\n\
        \x20 - may no longer reach autogroup:member (3 nodes), unless of the same user, on tcp on \
         all ports\n",
    );
}

#[test]
fn the_internet_beyond_an_exit_node_is_told() {
    check(
        "",
        r#"{"action": "accept", "proto": "tcp", "src": ["tag:db"], "dst": ["autogroup:internet:443"]}"#,
        "db\n  + may reach the internet on tcp 443\n",
    );
}

#[test]
fn one_family_alone_is_said_to_be_alone() {
    check(
        "",
        r#"{"action": "accept", "proto": "tcp", "src": ["tag:db"], "dst": ["100.64.0.3:22"]}"#,
        "db\n  + may reach desk on tcp 22, at IPv4 addresses only\n",
    );
}

#[test]
fn programs_get_the_same_as_names_and_numbers() {
    let document = between("", STAFF_TO_WEB).document();
    assert_eq!(document["same"], false);
    assert_eq!(
        document["changes"],
        serde_json::json!([{
            "effect": "opens",
            "srcs": ["desk", "laptop", "phone"],
            "dsts": ["web-1", "web-2"],
            "pairs": "all",
            "families": ["v4", "v6"],
            "services": [{"protocol": 6, "first": 443, "last": 443}],
        }])
    );
    assert_eq!(document["endpoints"]["desk"]["user"], "bob@example.com");
    assert_eq!(between("", "").document()["same"], true);
}
