//! Two networks on one coordinator, as alike as can be: nothing of one is visible in the other.

use crate::client::{At, Machine, names};
use crate::place::{ALLOW_ALL, Place};
use coordinator::http::admin::{Answer, Verb};
use proto::control::RefusalCode;

#[tokio::test]
async fn two_networks_with_the_same_prefixes_and_names_stay_apart() {
    let place = Place::start(None).await;
    let (v4, v6) = ("10.9.0.0/16".parse().ok(), "fd00:9::/48".parse().ok());
    let mut tokens = Vec::new();
    for name in ["red", "blue"] {
        let verb = Verb::NetworkCreate {
            name: name.to_owned(),
            v4,
            v6,
        };
        place.ask("", verb).await.unwrap();
        place.policy(name, ALLOW_ALL).await.unwrap();
        let login = "ana@example.com".to_owned();
        place.ask(name, Verb::UserCreate { login }).await.unwrap();
        tokens.push(place.token(name, "tag:web").await);
    }
    let machines: Vec<Machine> = (0..4).map(|_| Machine::new()).collect();
    let mut registered = Vec::new();
    for (machine, (token, name)) in machines.iter().zip([
        (&tokens[0], "web"),
        (&tokens[0], "db"),
        (&tokens[1], "web"),
        (&tokens[1], "db"),
    ]) {
        registered.push(machine.join(token, name).await.1);
    }
    // The same names and addresses, in different networks.
    for (red, blue) in [(0, 2), (1, 3)] {
        assert_eq!(registered[red].addrs, registered[blue].addrs);
        assert_eq!(registered[red].name, registered[blue].name);
        assert_eq!(
            registered[red].node, registered[blue].node,
            "ids tell nothing of others"
        );
        assert_ne!(registered[red].network, registered[blue].network);
    }

    let red_key = machines[1].secret.public();
    let mut red = machines[0]
        .connect(tokens[0].at())
        .await
        .poll(None)
        .await
        .unwrap();
    let mut netmap = red.full().await;
    assert_eq!(names(&netmap), ["db"]);
    assert_eq!(netmap.peers.values().next().unwrap().key, red_key);
    let bytes = red.bytes;

    // What happens in blue is not a byte in red.
    place.policy("blue", r#"{"acls": []}"#).await.unwrap();
    place
        .ask(
            "blue",
            Verb::NodeRemove {
                node: "db".to_owned(),
            },
        )
        .await
        .unwrap();
    Machine::new().join(&tokens[1], "new").await;
    assert_eq!(red.bytes, bytes);
    place
        .ask(
            "red",
            Verb::NodeRemove {
                node: "db".to_owned(),
            },
        )
        .await
        .unwrap();
    red.until(&mut netmap, |netmap| netmap.peers.is_empty())
        .await;

    for (network, expected) in [("red", vec!["web"]), ("blue", vec!["new", "web"])] {
        let nodes = place.nodes(network).await;
        assert_eq!(
            nodes
                .iter()
                .map(|node| node.name.as_str())
                .collect::<Vec<_>>(),
            expected
        );
        let Answer::Audit { entries, broken_at } =
            place.ask(network, Verb::AuditList).await.unwrap()
        else {
            panic!("not an audit log")
        };
        let other = if network == "red" { "blue" } else { "red" };
        assert_eq!(broken_at, None);
        assert!(entries.iter().all(|entry| entry.subject != other));
        assert!(
            (1..)
                .zip(&entries)
                .all(|(number, entry)| entry.number == number)
        );
    }

    // A node of one network does not join another, and loses nothing by trying.
    let mut client = machines[2].connect(tokens[0].at()).await;
    let secret = Some(tokens[0].secret.clone());
    let refused = client
        .register(&machines[2], secret, "web")
        .await
        .unwrap_err();
    assert_eq!(refused.code, RefusalCode::Token);
    assert_eq!(
        client.hello().await.unwrap().known,
        Some(registered[2].node)
    );

    let unnamed = place
        .ask("", Verb::NodeList)
        .await
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(unnamed.contains("blue, red"), "{unnamed}");
}
