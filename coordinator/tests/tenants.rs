//! Two networks on one coordinator, as alike as can be: nothing of one is visible in the other.

use crate::client::{At, Machine, names};
use crate::place::{ALLOW_ALL, Place};
use coordinator::http::admin::{Answer, Verb};
use proto::control::{JoinToken, RefusalCode, Registered};

/// `red` and `blue`, with the same prefixes, users, and nodes `web` and `db`.
struct Twins {
    place: Place,
    red: Network,
    blue: Network,
}

struct Network {
    token: JoinToken,
    web: (Machine, Registered),
    db: (Machine, Registered),
}

impl Twins {
    async fn start() -> Self {
        let place = Place::start(None).await;
        let (red, blue) = (network(&place, "red").await, network(&place, "blue").await);
        Self { place, red, blue }
    }
}

async fn network(place: &Place, name: &str) -> Network {
    let (v4, v6) = ("10.9.0.0/16".parse().ok(), "fd00:9::/48".parse().ok());
    let verb = Verb::NetworkCreate {
        name: name.to_owned(),
        v4,
        v6,
    };
    place.ask("", verb).await.unwrap();
    place.policy(name, ALLOW_ALL).await.unwrap();
    let login = "ana@example.com".to_owned();
    place.ask(name, Verb::UserCreate { login }).await.unwrap();
    let token = place.token(name, "tag:web").await;
    let join = async |hostname| {
        let machine = Machine::new();
        let (_, registered) = machine.join(&token, hostname).await;
        (machine, registered)
    };
    let (web, db) = (join("web").await, join("db").await);
    Network { token, web, db }
}

#[tokio::test]
async fn the_same_names_ids_and_addresses_are_others_in_another_network() {
    let Twins { place, red, blue } = Twins::start().await;
    for (red, blue) in [(&red.web.1, &blue.web.1), (&red.db.1, &blue.db.1)] {
        assert_eq!(red.addrs, blue.addrs);
        assert_eq!(red.name, blue.name);
        assert_eq!(red.node, blue.node, "ids tell nothing of others");
        assert_ne!(red.network, blue.network);
    }
    let mut stream = red.web.0.connect(red.token.at()).await;
    assert_eq!(
        stream.hello().await.unwrap().known,
        Some(red.web.1.node),
        "a machine is one node in one network"
    );
    let netmap = stream.poll(None).await.unwrap().full().await;
    assert_eq!(names(&netmap), ["db"]);
    let db = netmap.peers.values().next().unwrap();
    assert_eq!(db.key, red.db.0.secret.public());
    let unnamed = place.ask("", Verb::NodeList).await.map(|_| ()).unwrap_err();
    assert!(unnamed.to_string().contains("blue, red"), "{unnamed}");
}

#[tokio::test]
async fn what_happens_in_one_network_is_not_a_byte_in_the_other() {
    let Twins { place, red, blue } = Twins::start().await;
    let client = red.web.0.connect(red.token.at()).await;
    let mut stream = client.poll(None).await.unwrap();
    let mut netmap = stream.full().await;
    let bytes = stream.bytes;

    place.policy("blue", r#"{"acls": []}"#).await.unwrap();
    let remove = || Verb::NodeRemove {
        node: "db".to_owned(),
    };
    place.ask("blue", remove()).await.unwrap();
    Machine::new().join(&blue.token, "new").await;
    place.ask("red", remove()).await.unwrap();
    // The first thing that red hears is what happened in red.
    let Some(proto::netmap::Update::Delta(delta)) = stream.update().await else {
        panic!("not a delta after {bytes} bytes")
    };
    assert_eq!(delta.removed, [red.db.1.node]);
    netmap.apply(*delta).unwrap();
    assert!(netmap.peers.is_empty());

    for (network, expected) in [("red", vec!["web"]), ("blue", vec!["new", "web"])] {
        let nodes = place.nodes(network).await;
        let shown: Vec<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(shown, expected);
        let audit = place.ask(network, Verb::AuditList).await.unwrap();
        let Answer::Audit { entries, broken_at } = audit else {
            panic!("not an audit log")
        };
        let other = if network == "red" { "blue" } else { "red" };
        assert_eq!(broken_at, None);
        assert!(entries.iter().all(|entry| entry.subject != other));
        assert!((1..).zip(&entries).all(|(number, it)| it.number == number));
    }
}

#[tokio::test]
async fn a_node_of_one_network_does_not_join_another_and_loses_nothing_by_trying() {
    let Twins { place, red, blue } = Twins::start().await;
    let (machine, registered) = &blue.web;
    let mut client = machine.connect(red.token.at()).await;
    let secret = Some(red.token.secret.clone());
    let refused = client.register(machine, secret, "web").await.unwrap_err();
    assert_eq!(refused.code, RefusalCode::Token);
    assert_eq!(client.hello().await.unwrap().known, Some(registered.node));
    assert_eq!(place.nodes("red").await.len(), 2);
    assert_eq!(place.nodes("blue").await.len(), 2);
}
