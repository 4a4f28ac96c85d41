//! What nodes are told of relays, what they tell of themselves, and their permits.

use crate::client::{At, Machine};
use crate::place::{ALLOW_ALL, Place, ask};
use crate::postgres::Postgres;
use coordinator::config::Relays;
use coordinator::http::admin::{Answer, Verb};
use proto::control::{RefusalCode, Report};
use proto::id::{NetworkId, RegionId};
use proto::key::{DiscoKey, PermitKey};
use proto::netmap::{Region, RelayHost, Update};
use proto::permit::{Permit, PermitError, VALIDITY};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};

/// A map of one region.
pub fn relays(region: u16) -> Relays {
    let host = RelayHost {
        addr: "192.0.2.1:443".to_owned(),
        stun: Some(3478),
        plain: false,
        certificate: None,
    };
    let region = (
        RegionId(region),
        Region {
            name: format!("region {region}"),
            hosts: vec![host],
        },
    );
    Relays {
        stun: vec!["192.0.2.9:3478".to_owned()],
        regions: BTreeMap::from([region]),
    }
}

async fn key(place: &Place, network: &str) -> (NetworkId, PermitKey) {
    match ask(place.dir.path(), network, Verb::RelayKey)
        .await
        .unwrap()
    {
        Answer::RelayKey { network, key } => (network, key),
        _ => panic!("not a key"),
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap().as_secs()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_relay_map_reaches_nodes_that_have_the_newest_netmap() {
    let mut place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let a = Machine::new();
    a.join(&token, "a").await;
    let netmap = a.connect(token.at()).await.poll(None).await.unwrap();
    let netmap = { netmap }.full().await;
    assert!(netmap.network.relays.is_empty() && netmap.network.stun.is_empty());
    for next in [relays(1), relays(2), Relays::default()] {
        place.stop().await;
        place.relays = next.clone();
        place.resume(token.at().0).await;
        let base = Some(netmap.generation);
        let newer = a.connect(token.at()).await.poll(base).await.unwrap();
        let newer = { newer }.full().await;
        assert!(newer.generation > netmap.generation);
        assert_eq!(newer.network.stun, next.stun);
        assert_eq!(newer.network.relays, next.regions);
        // A start that changes nothing raises nothing.
        place.stop().await;
        place.resume(token.at().0).await;
        let same = a.connect(token.at()).await.poll(None).await.unwrap();
        let same = { same }.full().await;
        assert_eq!(same.network, newer.network);
    }
}

#[tokio::test]
async fn peers_are_told_where_a_node_is_at_home_and_what_its_probes_are_sealed_for() {
    let place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let (a, b) = (Machine::new(), Machine::new());
    a.join(&token, "a").await;
    let mut request = b.connect(token.at()).await;
    let secret = Some(token.secret.clone());
    let mut registration = request.registration(&b, secret, "b").await.unwrap();
    registration.disco = Some(DiscoKey([3; 32]));
    let joined: proto::control::Registered =
        request.call("/v1/register", &registration).await.unwrap();

    let mut stream = a.connect(token.at()).await.poll(None).await.unwrap();
    let netmap = stream.full().await;
    let peer = &netmap.peers[&joined.node];
    assert_eq!((peer.disco, peer.home), (Some(DiscoKey([3; 32])), None));

    let mut report = Report {
        routes: BTreeSet::new(),
        endpoints: Vec::new(),
        listen_port: 51820,
        disco: Some(DiscoKey([4; 32])),
        home: Some(RegionId(7)),
    };
    for home in [Some(RegionId(7)), Some(RegionId(8)), None] {
        report.home = home;
        request.report(&report).await.unwrap();
        let Some(Update::Delta(delta)) = stream.update().await else {
            panic!("not a delta")
        };
        // One peer, and nothing else, however often a home changes.
        assert!(delta.network.is_none() && delta.filter.is_none() && delta.me.is_none());
        let [peer] = &delta.set[..] else {
            panic!("{:?}", delta.set)
        };
        assert_eq!((peer.id, peer.home), (joined.node, home));
        assert_eq!(peer.disco, report.disco);
    }
}

#[tokio::test]
async fn a_permit_is_for_the_calling_node_alone_and_checked_by_the_printed_key() {
    let mut place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let a = Machine::new();
    let (mut client, _) = a.join(&token, "a").await;
    let refusal = client.call::<Permit>("/v1/permit", &json!({})).await;
    assert_eq!(refusal.unwrap_err().code, RefusalCode::NoRelays);

    place.stop().await;
    place.relays = relays(1);
    place.resume(token.at().0).await;
    let (network, key) = key(&place, "home").await;
    let mut client = a.connect(token.at()).await;
    let before = now();
    let permit: Permit = client.call("/v1/permit", &json!({})).await.unwrap();
    let node = a.secret.public();
    assert_eq!(permit.network, network);
    assert_eq!(permit.check(node, before, &[key]), Ok(()));
    let week = VALIDITY.as_secs();
    assert!((before + week..=now() + week).contains(&permit.expires));
    let late = permit.check(node, permit.expires, &[key]);
    assert_eq!(late, Err(PermitError::Expired));

    let stranger = Machine::new();
    let mut client = stranger.connect(token.at()).await;
    let refusal = client.call::<Permit>("/v1/permit", &json!({})).await;
    assert_eq!(refusal.unwrap_err().code, RefusalCode::UnknownNode);
    let wrong = client.call::<Permit>("/v1/permit", &json!([])).await;
    assert_eq!(wrong.unwrap_err().code, RefusalCode::BadRequest);
}

#[tokio::test]
async fn the_permit_key_outlives_restarts_and_is_one_for_all_networks() {
    let mut place = Place::with_network(None).await;
    place.network("work").await;
    let (home, work) = (key(&place, "home").await, key(&place, "work").await);
    assert_ne!(home.0, work.0);
    assert_eq!(home.1, work.1);
    let addr = place.at().0;
    place.stop().await;
    place.resume(addr).await;
    assert_eq!(key(&place, "home").await, home);
    let other = Place::with_network(None).await;
    assert_ne!(key(&other, "home").await.1, home.1);
}

#[tokio::test]
async fn replicas_sign_permits_with_one_key() {
    let Some(postgres) = Postgres::start("replicas_sign_permits_with_one_key") else {
        return;
    };
    let first = Place::with_network(Some(postgres.url())).await;
    let second = Place::start(Some(postgres.url())).await;
    assert_eq!(key(&first, "home").await, key(&second, "home").await);
}

#[tokio::test]
async fn policy_adds_its_own_relays_and_leaves_others_out() {
    let mut place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let (addr, _) = place.at();
    place.stop().await;
    place.relays = relays(1);
    place.resume(addr).await;
    let a = Machine::new();
    a.join(&token, "a").await;
    let mut stream = a.connect(token.at()).await.poll(None).await.unwrap();
    let mut netmap = stream.full().await;
    assert_eq!(netmap.network.relays, relays(1).regions);
    for (map, ids) in [
        (
            r#"{"Regions": {"9": {"Nodes": [{"HostName": "b"}]}}}"#,
            &[1, 9][..],
        ),
        (r#"{"Regions": {"1": null}}"#, &[]),
        ("{}", &[1]),
    ] {
        let policy = ALLOW_ALL.replacen('{', &format!("{{\"derpMap\": {map},"), 1);
        place.policy("home", &policy).await.unwrap();
        let fits = |ids: &[u16], netmap: &proto::netmap::Netmap| {
            netmap
                .network
                .relays
                .keys()
                .map(|id| id.0)
                .eq(ids.iter().copied())
        };
        stream.until(&mut netmap, |netmap| fits(ids, netmap)).await;
    }
    let wrong = r#"{"acls": [], "derpMap": {"Regions": {"x": {}}}}"#;
    assert!(place.policy("home", wrong).await.is_err());
}
