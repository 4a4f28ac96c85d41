//! How a machine becomes a node, stays it, and ceases to be it.

use crate::client::{At, Machine, names, random_secret};
use crate::place::{self, ALLOW_ALL, Place};
use crate::postgres::Postgres;
use coordinator::http::admin::{Answer, Verb};
use proto::control::{JoinToken, RefusalCode, Registered, Report, TokenSecret};
use proto::netmap::{Owner, Update};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::Barrier;

const SIMULTANEOUS: usize = 200;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_200_simultaneous_joins_with_a_single_use_token_over_two_coordinators_one_wins() {
    let test = "of_200_simultaneous_joins_with_a_single_use_token_over_two_coordinators_one_wins";
    let Some(postgres) = Postgres::start(test) else {
        return;
    };
    let ([first, second], dirs) = place::replicas(&postgres).await;
    let owner = Owner::Tags(BTreeSet::from(["tag:web".to_owned()]));
    let token = place::token(dirs[0].path(), "home", owner, false).await;

    // Everybody is at the door with a proven key before the first one knocks.
    let barrier = Arc::new(Barrier::new(SIMULTANEOUS));
    let joins: Vec<_> = (0..SIMULTANEOUS)
        .map(|number| {
            let addr = if number % 2 == 0 {
                first.addr
            } else {
                second.addr
            };
            let token = JoinToken {
                address: addr.to_string(),
                ..token.clone()
            };
            let barrier = Arc::clone(&barrier);
            tokio::spawn(async move {
                let machine = Machine::new();
                let mut client = machine.connect(token.at()).await;
                let secret = Some(token.secret.clone());
                let request = client
                    .registration(&machine, secret, "racer")
                    .await
                    .unwrap();
                barrier.wait().await;
                client.call::<Registered>("/v1/register", &request).await
            })
        })
        .collect();
    let mut winners = 0;
    for join in joins {
        match join.await.unwrap() {
            Ok(_) => winners += 1,
            Err(refusal) => assert_eq!(refusal.code, RefusalCode::Token, "{refusal}"),
        }
    }
    assert_eq!(winners, 1);
    let Answer::Nodes(nodes) = place::ask(dirs[1].path(), "home", Verb::NodeList)
        .await
        .unwrap()
    else {
        panic!("not a list of nodes")
    };
    assert_eq!(nodes.len(), 1);
}

async fn create_token(
    place: &Place,
    (reusable, ephemeral, valid_ms): (bool, bool, u64),
    owner: Owner,
) -> JoinToken {
    let verb = Verb::TokenCreate {
        owner,
        reusable,
        ephemeral,
        valid_ms,
    };
    match place.ask("home", verb).await.unwrap() {
        Answer::Token { token, .. } => token.parse().unwrap(),
        _ => panic!("not a token"),
    }
}

fn tag(name: &str) -> Owner {
    Owner::Tags(BTreeSet::from([name.to_owned()]))
}

#[tokio::test]
async fn a_token_admits_whom_it_says_and_no_one_else() {
    let place = Place::with_network(None).await;
    let login = "ana@example.com".to_owned();
    place
        .ask(
            "home",
            Verb::UserCreate {
                login: login.clone(),
            },
        )
        .await
        .unwrap();

    let once = create_token(&place, (false, false, 60_000), Owner::User(login.clone())).await;
    Machine::new().join(&once, "laptop").await;
    let machine = Machine::new();
    let mut client = machine.connect(once.at()).await;
    let refused = client
        .register(&machine, Some(once.secret.clone()), "x")
        .await
        .unwrap_err();
    assert_eq!(refused.code, RefusalCode::Token);
    assert!(refused.message.contains("one has joined"), "{refused}");

    let wrong = TokenSecret::from_bytes([0; 20]);
    let refused = client
        .register(&machine, Some(wrong), "x")
        .await
        .unwrap_err();
    assert!(refused.message.contains("does not know"), "{refused}");
    let refused = client.register(&machine, None, "x").await.unwrap_err();
    assert!(refused.message.contains("join with a token"), "{refused}");

    let expired = create_token(&place, (true, false, 1), tag("tag:web")).await;
    let refused = loop {
        let secret = Some(expired.secret.clone());
        // The token's one millisecond may not be over yet for the first machine.
        match client.register(&machine, secret, "x").await {
            Ok(_) => {
                client.logout().await.unwrap();
            }
            Err(refused) => break refused,
        }
    };
    assert!(refused.message.contains("expired"), "{refused}");

    let many = create_token(&place, (true, false, 60_000), tag("tag:web")).await;
    for _ in 0..2 {
        Machine::new().join(&many, "web.example.com").await;
    }
    let nodes = place.nodes("home").await;
    let shown: Vec<_> = nodes
        .iter()
        .map(|node| (node.name.as_str(), node.owner.as_str()))
        .collect();
    assert_eq!(
        shown,
        [
            ("laptop", "ana@example.com"),
            ("web", "tag:web"),
            ("web-2", "tag:web")
        ]
    );
}

#[tokio::test]
async fn a_token_for_nobody_or_for_ever_is_not_made() {
    let place = Place::with_network(None).await;
    let make = async |owner, valid_ms| {
        let verb = Verb::TokenCreate {
            owner,
            reusable: false,
            ephemeral: false,
            valid_ms,
        };
        place
            .ask("home", verb)
            .await
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    place
        .ask(
            "home",
            Verb::UserCreate {
                login: "ana@example.com".to_owned(),
            },
        )
        .await
        .unwrap();
    let unknown = make(Owner::User("anna@example.com".to_owned()), 1).await;
    assert!(
        unknown.contains("did you mean `ana@example.com`"),
        "{unknown}"
    );
    assert!(make(tag("web"), 1).await.contains("`tag:`"));
    assert!(make(tag("tag:web"), 0).await.contains("366 days"));
    assert!(make(tag("tag:web"), u64::MAX).await.contains("366 days"));
}

#[tokio::test]
async fn a_node_registers_again_without_a_token_and_with_a_new_key() {
    let place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let (mut machine, peer) = (Machine::new(), Machine::new());
    let (mut client, first) = machine.join(&token, "web").await;
    peer.join(&token, "peer").await;
    let mut stream = peer.connect(token.at()).await.poll(None).await.unwrap();
    let mut netmap = stream.full().await;

    assert_eq!(
        client.register(&machine, None, "renamed").await.unwrap(),
        first
    );
    let old_key = machine.secret.public();
    machine.secret = random_secret();
    let again = client
        .register(&machine, Some(token.secret.clone()), "renamed")
        .await
        .unwrap();
    assert_eq!(again, first, "the same node, name and addresses");
    let new_key = machine.secret.public();
    stream
        .until(&mut netmap, |netmap| {
            netmap.peers.values().any(|peer| peer.key == new_key)
        })
        .await;
    assert!(netmap.peers.values().all(|peer| peer.key != old_key));
}

#[tokio::test]
async fn addresses_come_from_the_networks_prefixes_and_are_nobody_elses() {
    let place = Place::start(None).await;
    let verb = Verb::NetworkCreate {
        name: "home".to_owned(),
        v4: Some("10.9.8.0/29".parse().unwrap()),
        v6: Some("fd00:9::/64".parse().unwrap()),
    };
    place.ask("", verb).await.unwrap();
    let token = place.token("home", "tag:web").await;
    let mut given = BTreeSet::new();
    let mut clients = Vec::new();
    for _ in 0..6 {
        let (client, registered) = Machine::new().join(&token, "web").await;
        let inside = |addr: &IpAddr| match addr {
            IpAddr::V4(v4) => {
                v4.octets().starts_with(&[10, 9, 8]) && (1..7).contains(&v4.octets()[3])
            }
            IpAddr::V6(v6) => v6.segments()[..4] == [0xfd00, 9, 0, 0],
        };
        assert!(
            registered.addrs.iter().all(inside),
            "{:?}",
            registered.addrs
        );
        given.extend(registered.addrs);
        clients.push(client);
    }
    assert_eq!(given.len(), 12);
    let machine = Machine::new();
    let mut client = machine.connect(token.at()).await;
    let refused = client
        .register(&machine, Some(token.secret.clone()), "x")
        .await
        .unwrap_err();
    assert_eq!(refused.code, RefusalCode::Limit);
    clients[2].logout().await.unwrap();
    let registered = client
        .register(&machine, Some(token.secret.clone()), "x")
        .await
        .unwrap();
    assert!(
        registered.addrs.iter().all(|addr| given.contains(addr)),
        "the free one again"
    );
}

#[tokio::test]
async fn the_same_report_twice_changes_nothing() {
    let place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let (mut client, _) = Machine::new().join(&token, "web").await;
    let generation = async || match place.ask("", Verb::NetworkList).await.unwrap() {
        Answer::Networks(networks) => networks[0].generation,
        _ => panic!("not a list of networks"),
    };
    let report = Report {
        routes: BTreeSet::from(["10.1.0.0/16".parse().unwrap()]),
        endpoints: vec!["198.51.100.1:1".parse().unwrap()],
        listen_port: 1,
        disco: None,
        home: None,
    };
    let before = generation().await;
    client.report(&report).await.unwrap();
    assert_eq!(generation().await, before + 1);
    client.report(&report).await.unwrap();
    assert_eq!(generation().await, before + 1);
}

#[tokio::test]
async fn an_offer_that_would_harm_the_network_is_refused_and_noise_is_dropped() {
    let place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let (mut client, registered) = Machine::new().join(&token, "web").await;
    let mut offer = async |routes: &[&str], endpoints: &[&str]| {
        let report = Report {
            routes: routes.iter().map(|route| route.parse().unwrap()).collect(),
            endpoints: endpoints
                .iter()
                .map(|endpoint| endpoint.parse().unwrap())
                .collect(),
            listen_port: 1,
            disco: None,
            home: None,
        };
        client
            .report(&report)
            .await
            .map_err(|refusal| refusal.message)
    };
    let own = offer(&["100.64.0.0/16"], &[]).await.unwrap_err();
    assert!(own.contains("overlaps 100.64.0.0/10"), "{own}");
    assert!(
        offer(&["0.0.0.0/0"], &[])
            .await
            .unwrap_err()
            .contains("default route")
    );
    let many: Vec<String> = (0..1025)
        .map(|n| format!("10.{}.{}.0/24", n / 256, n % 256))
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert!(
        offer(&many, &[])
            .await
            .unwrap_err()
            .contains("at most 1024")
    );
    assert!(
        offer(&[], &["192.0.2.1:1"; 33])
            .await
            .unwrap_err()
            .contains("at most 32")
    );

    let noise = [
        "192.0.2.1:1",
        "192.0.2.1:1",
        "0.0.0.0:1",
        "127.0.0.1:1",
        "[::ffff:192.0.2.1]:1",
        "224.0.0.1:1",
        "192.0.2.2:0",
        "[fe80::1]:1",
    ];
    offer(&[], &noise).await.unwrap();
    let nodes = place.nodes("home").await;
    assert_eq!(nodes[0].id, registered.node);
    assert_eq!(nodes[0].endpoints, ["192.0.2.1:1".parse().unwrap()]);
}

#[tokio::test]
async fn a_route_is_served_once_it_is_offered_and_approved_and_by_one_node_alone() {
    let place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let (mut a, _) = Machine::new().join(&token, "a").await;
    let (mut b, _) = Machine::new().join(&token, "b").await;
    let watcher = Machine::new();
    watcher.join(&token, "watcher").await;
    let mut stream = watcher.connect(token.at()).await.poll(None).await.unwrap();
    let mut netmap = stream.full().await;
    let lan: proto::net::Prefix = "192.168.7.0/24".parse().unwrap();
    let approve = async |node: &str, route: &str| {
        let (node, route) = (node.to_owned(), route.parse().unwrap());
        let done = place.ask("home", Verb::RouteApprove { node, route }).await;
        done.map(|_| ()).map_err(|error| error.to_string())
    };
    assert!(
        approve("a", "192.168.7.0/24")
            .await
            .unwrap_err()
            .contains("offers no route")
    );
    let report = |route: &str| Report {
        routes: BTreeSet::from([route.parse().unwrap()]),
        endpoints: vec![],
        listen_port: 1,
        disco: None,
        home: None,
    };
    a.report(&report("192.168.7.0/24")).await.unwrap();
    b.report(&report("192.168.0.0/16")).await.unwrap();
    assert!(
        approve("a", "192.168.8.0/24")
            .await
            .unwrap_err()
            .contains("offers 192.168.7.0/24")
    );
    assert!(
        approve("aa", "192.168.7.0/24")
            .await
            .unwrap_err()
            .contains("did you mean `a`")
    );
    approve("a", "192.168.7.0/24").await.unwrap();
    let taken = approve("b", "192.168.0.0/16").await.unwrap_err();
    assert!(taken.contains("`a` serves already"), "{taken}");

    let routes = |netmap: &proto::netmap::Netmap, name: &str| {
        netmap
            .peers
            .values()
            .find(|peer| peer.name == name)
            .unwrap()
            .routes
            .clone()
    };
    stream
        .until(&mut netmap, |netmap| routes(netmap, "a").contains(&lan))
        .await;
    assert!(routes(&netmap, "b").is_empty());
    a.report(&Report {
        routes: BTreeSet::new(),
        ..report("192.168.7.0/24")
    })
    .await
    .unwrap();
    stream
        .until(&mut netmap, |netmap| routes(netmap, "a").is_empty())
        .await;
}

#[tokio::test]
async fn removal_logout_and_time_take_a_node_out_of_its_peers_netmaps() {
    let place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let watcher = Machine::new();
    watcher.join(&token, "watcher").await;
    let (removed, ephemeral) = (Machine::new(), Machine::new());
    removed.join(&token, "removed").await;
    let (mut leaving, _) = Machine::new().join(&token, "leaving").await;
    let once = create_token(&place, (false, true, 60_000), tag("tag:web")).await;
    ephemeral.join(&once, "ephemeral").await;

    let mut stream = watcher.connect(token.at()).await.poll(None).await.unwrap();
    let mut netmap = stream.full().await;
    let mut removed_stream = removed.connect(token.at()).await.poll(None).await.unwrap();
    removed_stream.full().await;

    // The coordinator of this test lets ephemeral nodes stay away for a second.
    stream
        .until(&mut netmap, |netmap| !names(netmap).contains(&"ephemeral"))
        .await;
    leaving.logout().await.unwrap();
    stream
        .until(&mut netmap, |netmap| !names(netmap).contains(&"leaving"))
        .await;
    place
        .ask(
            "home",
            Verb::NodeRemove {
                node: "removed".to_owned(),
            },
        )
        .await
        .unwrap();
    stream
        .until(&mut netmap, |netmap| names(netmap).is_empty())
        .await;
    assert!(netmap.peers_empty_on_purpose);
    while removed_stream.next().await.is_some() {}
    let refused = removed
        .connect(token.at())
        .await
        .poll(None)
        .await
        .err()
        .unwrap();
    assert_eq!(refused.code, RefusalCode::UnknownNode);

    // Its name and a new key may come back with a token, as another node.
    let (_, again) = removed.join(&token, "removed").await;
    assert!(again.node > netmap.me.id);
}

#[tokio::test]
async fn peers_are_shown_online_while_they_hold_a_stream() {
    let place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let (a, b) = (Machine::new(), Machine::new());
    a.join(&token, "a").await;
    b.join(&token, "b").await;
    let mut stream = a.connect(token.at()).await.poll(None).await.unwrap();
    let mut netmap = stream.full().await;
    let online = |netmap: &proto::netmap::Netmap| netmap.peers.values().all(|peer| peer.online);
    assert!(!online(&netmap));
    let held = b.connect(token.at()).await.poll(None).await.unwrap();
    stream.until(&mut netmap, online).await;
    drop(held);
    stream.until(&mut netmap, |netmap| !online(netmap)).await;
}

#[tokio::test]
async fn a_newer_stream_of_a_node_ends_the_older() {
    let place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let machine = Machine::new();
    machine.join(&token, "a").await;
    let mut older = machine.connect(token.at()).await.poll(None).await.unwrap();
    older.full().await;
    let mut newer = machine.connect(token.at()).await.poll(None).await.unwrap();
    newer.full().await;
    while older.next().await.is_some() {}
}

#[tokio::test]
async fn a_node_that_comes_back_gets_a_delta_and_one_from_long_ago_a_whole_netmap() {
    let place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let (a, b) = (Machine::new(), Machine::new());
    a.join(&token, "a").await;
    let mut stream = a.connect(token.at()).await.poll(None).await.unwrap();
    let mut netmap = stream.full().await;
    drop(stream);
    b.join(&token, "b").await;

    let base = Some(netmap.generation);
    let mut stream = a.connect(token.at()).await.poll(base).await.unwrap();
    let Some(Update::Delta(delta)) = stream.update().await else {
        panic!("not a delta")
    };
    netmap.apply(*delta).unwrap();
    stream
        .until(&mut netmap, |netmap| names(netmap) == ["b"])
        .await;
    drop(stream);

    for stale in [1, u64::MAX] {
        let base = Some(proto::id::Generation(stale));
        let mut stream = a.connect(token.at()).await.poll(base).await.unwrap();
        assert_eq!(stream.full().await.peers.len(), 1);
    }
}

#[tokio::test]
async fn the_seen_address_and_the_port_are_one_more_endpoint() {
    let place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let (a, b) = (Machine::new(), Machine::new());
    a.join(&token, "a").await;
    b.join(&token, "b").await;
    assert_eq!(
        place.nodes("home").await[1].seen,
        Some([127, 0, 0, 1].into())
    );
    let mut stream = a.connect(token.at()).await.poll(None).await.unwrap();
    let netmap = stream.full().await;
    // The loopback address of this test is nobody else's endpoint.
    let peer = netmap.peers.values().next().unwrap();
    assert_eq!(peer.endpoints, ["192.0.2.7:51820".parse().unwrap()]);
}

#[tokio::test]
async fn without_a_policy_nobody_sees_anybody_and_with_one_those_who_may_talk() {
    let place = Place::start(None).await;
    place.network("home").await;
    let (web, db) = (
        place.token("home", "tag:web").await,
        place.token("home", "tag:db").await,
    );
    let machines = [Machine::new(), Machine::new(), Machine::new()];
    machines[0].join(&web, "web").await;
    machines[1].join(&db, "db").await;
    machines[2].join(&db, "other-db").await;
    let mut stream = machines[0]
        .connect(web.at())
        .await
        .poll(None)
        .await
        .unwrap();
    let mut netmap = stream.full().await;
    assert!(netmap.peers.is_empty() && netmap.peers_empty_on_purpose);
    assert!(netmap.filter.ingress.is_empty() && netmap.filter.egress.is_empty());

    let policy = r#"{
        "tagOwners": {"tag:web": [], "tag:db": []},
        "acls": [{"action": "accept", "src": ["tag:web"], "dst": ["tag:db:5432"]}],
    }"#;
    place.policy("home", policy).await.unwrap();
    stream
        .until(&mut netmap, |netmap| names(netmap) == ["db", "other-db"])
        .await;
    assert_eq!(
        (netmap.filter.ingress.len(), netmap.filter.egress.len()),
        (0, 1)
    );

    let mut stream = machines[1]
        .connect(web.at())
        .await
        .poll(None)
        .await
        .unwrap();
    let netmap = stream.full().await;
    assert_eq!(
        names(&netmap),
        ["web"],
        "the databases have nothing to say to each other"
    );
    assert_eq!(netmap.filter.ingress.len(), 1);

    for (bad, word) in [
        ("{\"acls\": [,]}", "policy.hujson:1:"),
        ("{}", "neither `acls` nor `grants`"),
        (
            r#"{"tagOwners": {"tag:web": [], "tag:db": []}, "acls": [],
                "tests": [{"src": "tag:web", "accept": ["tag:db:5432"]}]}"#,
            "policy.hujson:2:",
        ),
    ] {
        let refused = place
            .policy("home", bad)
            .await
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert!(refused.contains(word), "{refused}");
    }
    match place.ask("home", Verb::PolicyGet).await.unwrap() {
        Answer::Policy { text } => assert_eq!(text.as_deref(), Some(policy)),
        _ => panic!("not a policy"),
    }
    place.policy("home", ALLOW_ALL).await.unwrap();
}
