//! Two coordinators on one Postgres serve one network.

use crate::client::{At, Machine, names};
use crate::place::{self, ALLOW_ALL, Place, Process};
use crate::postgres::Postgres;
use coordinator::http::admin::Verb;
use proto::control::JoinToken;
use proto::netmap::{Owner, Update};
use std::collections::BTreeSet;
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

/// As after a crash: nothing is handed over, and what the dead one held in the database is taken.
#[tokio::test]
async fn a_coordinator_that_is_killed_takes_nothing_with_it() {
    let Some(postgres) = Postgres::start("a_coordinator_that_is_killed_takes_nothing_with_it")
    else {
        return;
    };
    let ([first, second], dirs) = place::replicas(&postgres).await;
    let policy = Verb::PolicySet {
        text: ALLOW_ALL.to_owned(),
        file: "policy.hujson".to_owned(),
        compare: false,
    };
    place::ask(dirs[0].path(), "home", policy).await.unwrap();
    let owner = Owner::Tags(BTreeSet::from(["tag:web".to_owned()]));
    let token = place::token(dirs[0].path(), "home", owner, true).await;
    let at = |process: &Process| JoinToken {
        address: process.addr.to_string(),
        ..token.clone()
    };
    let (here, there) = (at(&first), at(&second));

    let (a, b, c) = (Machine::new(), Machine::new(), Machine::new());
    a.join(&here, "a").await;
    b.join(&here, "b").await;
    let mut stream = a.connect(here.at()).await.poll(None).await.unwrap();
    let mut netmap = stream.full().await;
    assert_eq!(names(&netmap), ["b"]);
    let mut watching = b.connect(there.at()).await.poll(None).await.unwrap();
    let mut seen = watching.full().await;

    drop(first);
    while stream.next().await.is_some() {}
    let base = Some(netmap.generation);
    let mut stream = a.connect(there.at()).await.poll(base).await.unwrap();
    match stream.update().await.unwrap() {
        Update::Full(full) => netmap = *full,
        Update::Delta(delta) => netmap.apply(*delta).unwrap(),
    }
    assert_eq!(names(&netmap), ["b"], "nothing is lost");
    c.join(&there, "c").await;
    stream
        .until(&mut netmap, |netmap| names(netmap) == ["b", "c"])
        .await;
    watching
        .until(&mut seen, |netmap| names(netmap) == ["a", "c"])
        .await;
}
