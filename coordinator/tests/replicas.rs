//! Two coordinators on one Postgres serve one network.

use crate::client::{At, Machine, names};
use crate::place::Place;
use crate::postgres::Postgres;
use proto::control::JoinToken;
use proto::netmap::Update;
use std::fs;

async fn pair(postgres: &Postgres) -> (Place, Place) {
    let first = Place::with_network(Some(postgres.url())).await;
    let mut second = Place::start(Some(postgres.url())).await;
    let addr = second.at().0;
    second.stop().await;
    // Replicas show the same certificate.
    for file in ["certificate.pem", "certificate-key.pem"] {
        fs::copy(first.dir.path().join(file), second.dir.path().join(file)).unwrap();
    }
    second.resume(addr).await;
    (first, second)
}

#[tokio::test]
async fn a_change_at_one_coordinator_streams_from_the_other() {
    let test = "a_change_at_one_coordinator_streams_from_the_other";
    let Some(postgres) = Postgres::start(test) else {
        return;
    };
    let (first, second) = pair(&postgres).await;
    let token = first.token("home", "tag:web").await;
    let there = JoinToken {
        address: second.at().0.to_string(),
        ..token.clone()
    };

    let (a, b) = (Machine::new(), Machine::new());
    a.join(&token, "a").await;
    let mut stream = a.connect(there.at()).await.poll(None).await.unwrap();
    let mut netmap = stream.full().await;
    b.join(&token, "b").await;
    stream
        .until(&mut netmap, |netmap| names(netmap) == ["b"])
        .await;
    first.policy("home", r#"{"acls": []}"#).await.unwrap();
    stream
        .until(&mut netmap, |netmap| netmap.peers.is_empty())
        .await;
    assert!(netmap.peers_empty_on_purpose);
}

#[tokio::test]
async fn a_node_whose_coordinator_dies_goes_on_at_the_other() {
    let test = "a_node_whose_coordinator_dies_goes_on_at_the_other";
    let Some(postgres) = Postgres::start(test) else {
        return;
    };
    let (mut first, second) = pair(&postgres).await;
    let token = first.token("home", "tag:web").await;
    let there = JoinToken {
        address: second.at().0.to_string(),
        ..token.clone()
    };
    let (a, b, watcher) = (Machine::new(), Machine::new(), Machine::new());
    for (machine, name) in [(&a, "a"), (&b, "b"), (&watcher, "watcher")] {
        machine.join(&token, name).await;
    }
    let mut watching = watcher.connect(there.at()).await.poll(None).await.unwrap();
    watching.full().await;
    let mut stream = a.connect(token.at()).await.poll(None).await.unwrap();
    let mut netmap = stream.full().await;
    assert_eq!(names(&netmap), ["b", "watcher"]);

    first.stop().await;
    while stream.next().await.is_some() {}
    let mut stream = a
        .connect(there.at())
        .await
        .poll(Some(netmap.generation))
        .await
        .unwrap();
    match stream.update().await.unwrap() {
        Update::Full(full) => netmap = *full,
        Update::Delta(delta) => netmap.apply(*delta).unwrap(),
    }
    b.connect(there.at()).await.logout().await.unwrap();
    stream
        .until(&mut netmap, |netmap| names(netmap) == ["watcher"])
        .await;
}
