//! One conformance suite for both databases: what each verb of the store promises.

use crate::postgres::Postgres;
use coordinator::store::{
    AuditEntry, Chain, Changed, NetworkRow, NewNetwork, NodeRow, Store, Timestamp, TokenHash,
    TokenRow, TokenState,
};
use proto::control::TokenSecret;
use proto::id::{Generation, NetworkId, NodeId, RegionId};
use proto::key::{DiscoKey, MachineId, NodeKey};
use proto::netmap::Owner;
use sqlx::Connection;
use std::collections::BTreeSet;

const HOME: NetworkId = NetworkId(7);
const WORK: NetworkId = NetworkId(9);
const NOW: Timestamp = Timestamp(1_000_000);

#[tokio::test]
async fn sqlite_keeps_the_stores_promises() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    conform(&Store::open_sqlite(&path).await.unwrap()).await;
    let url = format!("sqlite:{}", path.display());
    let mut raw = sqlx::SqliteConnection::connect(&url).await.unwrap();
    for sql in ["UPDATE audit SET actor = 'nobody'", "DELETE FROM audit"] {
        let error = sqlx::query(sql)
            .execute(&mut raw)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("append-only"), "{error}");
    }
    for sql in ["DROP TRIGGER audit_is_not_changed", FORGE] {
        sqlx::query(sql).execute(&mut raw).await.unwrap();
    }
    forgery_shows(&Store::open_url(&url).await.unwrap()).await;
}

#[tokio::test]
async fn postgres_keeps_the_stores_promises() {
    let Some(postgres) = Postgres::start("postgres_keeps_the_stores_promises") else {
        return;
    };
    let url = postgres.url();
    conform(&Store::open_url(&url).await.unwrap()).await;
    let mut raw = sqlx::PgConnection::connect(&url).await.unwrap();
    for sql in [
        "UPDATE audit SET actor = 'nobody'",
        "DELETE FROM audit",
        "TRUNCATE audit",
    ] {
        let error = sqlx::query(sql)
            .execute(&mut raw)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("append-only"), "{error}");
    }
    for sql in ["DROP TRIGGER audit_is_not_changed ON audit", FORGE] {
        sqlx::query(sql).execute(&mut raw).await.unwrap();
    }
    forgery_shows(&Store::open_url(&url).await.unwrap()).await;
}

#[tokio::test]
async fn postgres_is_reached_over_tls_and_its_certificate_is_checked() {
    let test = "postgres_is_reached_over_tls_and_its_certificate_is_checked";
    let Some(postgres) = Postgres::start_with_tls(test) else {
        return;
    };
    let url = postgres.tls_url();
    Store::open_url(&url).await.unwrap();
    let (unchecked, _) = url.split_once("&sslrootcert").unwrap();
    let error = Store::open_url(unchecked).await.map(|_| ()).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("certificate"), "{cause}");
}

const FORGE: &str = "UPDATE audit SET actor = 'nobody' WHERE number = 2";

/// Whoever gets around the schema is shown by the chain.
async fn forgery_shows(store: &Store) {
    let (_, chain) = store.read().await.unwrap().audit(HOME).await.unwrap();
    assert_eq!(chain, Chain::Broken { number: 2 });
}

async fn conform(store: &Store) {
    networks_have_a_name_and_a_generation_that_rises(store).await;
    a_dropped_transaction_changes_nothing_and_a_commit_is_heard(store).await;
    users_and_policy_are_kept_as_given(store).await;
    nodes_keep_every_field_and_share_none_that_is_unique(store).await;
    hosts_and_ids_are_never_given_twice(store).await;
    what_changed_since_is_all_that_changed(store).await;
    a_token_admits_as_often_as_it_says(store).await;
    of_simultaneous_claims_one_wins(store).await;
    presence_belongs_to_the_replica_that_holds_the_stream(store).await;
    the_audit_log_is_a_chain(store).await;
    all_who_ask_get_the_seed_that_was_first(store).await;
}

async fn all_who_ask_get_the_seed_that_was_first(store: &Store) {
    let ask = async |fresh: u8| {
        let mut tx = store.write().await.unwrap();
        let seed = tx.permit_seed(&[fresh; 32], NOW).await.unwrap();
        tx.commit().await.unwrap();
        *seed
    };
    let (a, b) = tokio::join!(ask(1), ask(2));
    assert!(a == b && (a == [1; 32] || a == [2; 32]));
    assert_eq!(ask(3).await, a);
}

async fn networks_have_a_name_and_a_generation_that_rises(store: &Store) {
    for (id, name) in [(HOME, "home"), (WORK, "work")] {
        let mut tx = store.write().await.unwrap();
        tx.insert_network(new(id, name)).await.unwrap();
        tx.commit().await.unwrap();
    }
    let mut tx = store.write().await.unwrap();
    let taken = tx
        .insert_network(new(NetworkId(8), "home"))
        .await
        .unwrap_err();
    assert!(taken.is_duplicate());
    drop(tx);

    let mut tx = store.write().await.unwrap();
    let before = tx.network(HOME).await.unwrap().unwrap();
    let raised = tx.raise(HOME).await.unwrap();
    assert_eq!(raised.generation.0, before.generation.0 + 1);
    assert!(
        tx.raise(NetworkId(1)).await.is_err(),
        "a network that is not there cannot change"
    );
    drop(tx);

    let mut tx = store.read().await.unwrap();
    let names: Vec<String> = tx
        .networks()
        .await
        .unwrap()
        .into_iter()
        .map(|it| it.name)
        .collect();
    assert_eq!(names, ["home", "work"]);
    assert_eq!(tx.network(HOME).await.unwrap(), Some(before));
    assert_eq!(tx.network(NetworkId(1)).await.unwrap(), None);
}

fn new(id: NetworkId, name: &str) -> NewNetwork<'_> {
    let (v4, v6) = (
        "100.64.0.0/10".parse().unwrap(),
        "fd00::/48".parse().unwrap(),
    );
    NewNetwork { id, name, v4, v6 }
}

async fn a_dropped_transaction_changes_nothing_and_a_commit_is_heard(store: &Store) {
    let mut changes = store.changes();
    let mut tx = store.write().await.unwrap();
    tx.raise(WORK).await.unwrap();
    drop(tx);
    let mut tx = store.write().await.unwrap();
    tx.raise(HOME).await.unwrap();
    tx.commit().await.unwrap();
    // Postgres may still repeat what was said of the insertions; it says nothing of what was dropped.
    while changes.recv().await != Ok(Changed::Network(HOME)) {}

    let mut tx = store.write().await.unwrap();
    let raised = tx.raise(WORK).await.unwrap();
    tx.lower(&raised).await.unwrap();
    tx.commit().await.unwrap();
    let mut tx = store.read().await.unwrap();
    assert_eq!(
        tx.network(WORK).await.unwrap().unwrap().generation,
        Generation(1)
    );
}

async fn users_and_policy_are_kept_as_given(store: &Store) {
    let mut tx = store.write().await.unwrap();
    let network = tx.raise(HOME).await.unwrap();
    assert!(
        tx.insert_user(&network, "zoe@example.com", NOW)
            .await
            .unwrap()
    );
    assert!(
        tx.insert_user(&network, "ana@example.com", Timestamp(NOW.0 + 1))
            .await
            .unwrap()
    );
    assert!(
        !tx.insert_user(&network, "ana@example.com", NOW)
            .await
            .unwrap()
    );
    assert_eq!(tx.policy(HOME).await.unwrap(), None);
    for text in ["{}", "// comments stay\n{\"acls\": []}\n"] {
        tx.set_policy(&network, text).await.unwrap();
    }
    tx.commit().await.unwrap();
    let mut tx = store.read().await.unwrap();
    assert_eq!(
        tx.users(HOME).await.unwrap(),
        ["zoe@example.com", "ana@example.com"]
    );
    assert_eq!(tx.users(WORK).await.unwrap(), Vec::<String>::new());
    let text = tx.policy(HOME).await.unwrap().unwrap();
    assert_eq!(text, "// comments stay\n{\"acls\": []}\n");
    assert_eq!(
        tx.network(HOME).await.unwrap().unwrap().policy_generation,
        network.generation
    );
}

/// A node all of whose unique fields come from `seed`.
pub fn node(network: NetworkId, seed: u64) -> NodeRow {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&(network.0 * 1_000_003 + seed).to_be_bytes());
    NodeRow {
        network,
        id: NodeId(seed),
        name: format!("n{seed}"),
        machine: MachineId(bytes),
        key: NodeKey(bytes),
        host: seed,
        owner: Owner::Tags(BTreeSet::from(["tag:a".to_owned(), "tag:b".to_owned()])),
        ephemeral: seed % 2 == 1,
        advertised: BTreeSet::from(["10.1.0.0/16".parse().unwrap()]),
        approved: BTreeSet::from(["fd01::/64".parse().unwrap()]),
        endpoints: vec![
            "[2001:db8::1]:1".parse().unwrap(),
            "192.0.2.1:2".parse().unwrap(),
        ],
        listen_port: 65_535,
        seen_addr: Some("2001:db8::2".parse().unwrap()),
        online: false,
        last_seen: NOW,
        created: Timestamp(i64::MAX),
        disco: Some(DiscoKey(bytes)),
        home: Some(RegionId(u16::MAX)),
    }
}

async fn insert(store: &Store, row: &NodeRow) -> NetworkRow {
    let mut tx = store.write().await.unwrap();
    let network = tx.raise(row.network).await.unwrap();
    tx.insert_node(&network, row).await.unwrap();
    tx.commit().await.unwrap();
    network
}

async fn nodes_keep_every_field_and_share_none_that_is_unique(store: &Store) {
    let first = node(HOME, 1);
    insert(store, &first).await;
    let bare = NodeRow {
        owner: Owner::User("ana@example.com".to_owned()),
        advertised: BTreeSet::new(),
        endpoints: Vec::new(),
        seen_addr: None,
        disco: None,
        home: None,
        ..node(HOME, 2)
    };
    insert(store, &bare).await;
    let mut tx = store.read().await.unwrap();
    assert_eq!(tx.nodes(HOME).await.unwrap(), [first.clone(), bare.clone()]);
    assert_eq!(
        tx.node_by_machine(first.machine).await.unwrap(),
        Some(first.clone())
    );
    assert_eq!(tx.node(HOME, NodeId(2)).await.unwrap(), Some(bare.clone()));
    assert_eq!(tx.node(WORK, NodeId(2)).await.unwrap(), None);
    assert_eq!(
        tx.machine_by_key(bare.key).await.unwrap(),
        Some(bare.machine)
    );
    drop(tx);

    let fresh = node(HOME, 3);
    let clashes = [
        NodeRow {
            name: first.name.clone(),
            ..fresh.clone()
        },
        NodeRow {
            machine: first.machine,
            ..fresh.clone()
        },
        NodeRow {
            key: first.key,
            ..fresh.clone()
        },
        NodeRow {
            host: first.host,
            ..fresh.clone()
        },
        NodeRow {
            id: first.id,
            ..fresh.clone()
        },
        NodeRow {
            machine: first.machine,
            ..node(WORK, 3)
        },
        NodeRow {
            key: first.key,
            ..node(WORK, 3)
        },
    ];
    for clash in clashes {
        let mut tx = store.write().await.unwrap();
        let network = tx.raise(clash.network).await.unwrap();
        assert!(
            tx.insert_node(&network, &clash)
                .await
                .unwrap_err()
                .is_duplicate(),
            "{clash:?}"
        );
    }
    // The same name and host in another network is another thing.
    insert(store, &node(WORK, 1)).await;

    let changed = NodeRow {
        key: NodeKey([9; 32]),
        ephemeral: false,
        disco: None,
        home: Some(RegionId(1)),
        ..first
    };
    let mut tx = store.write().await.unwrap();
    let network = tx.raise(HOME).await.unwrap();
    tx.update_node(&network, &changed).await.unwrap();
    tx.commit().await.unwrap();
    let mut tx = store.read().await.unwrap();
    assert_eq!(tx.nodes(HOME).await.unwrap(), [changed, bare]);
}

async fn hosts_and_ids_are_never_given_twice(store: &Store) {
    let mut tx = store.write().await.unwrap();
    tx.raise(WORK).await.unwrap();
    // `n1` has host 1. 2 and 3 are free; then the search starts anew and finds none.
    let mut given = Vec::new();
    for _ in 0..2 {
        let host = tx.next_host(WORK, 3).await.unwrap().unwrap();
        given.push(host);
        let network = tx.network(WORK).await.unwrap().unwrap();
        tx.insert_node(
            &network,
            &NodeRow {
                host,
                ..node(WORK, 10 + host)
            },
        )
        .await
        .unwrap();
    }
    assert_eq!(given, [2, 3]);
    assert_eq!(tx.next_host(WORK, 3).await.unwrap(), None);
    let network = tx.network(WORK).await.unwrap().unwrap();
    tx.delete_node(&network, NodeId(12)).await.unwrap();
    assert_eq!(
        tx.next_host(WORK, 3).await.unwrap(),
        Some(2),
        "the gap is found after the end"
    );
    let ids = [
        tx.next_node_id(WORK).await.unwrap(),
        tx.next_node_id(WORK).await.unwrap(),
    ];
    assert_eq!(ids, [NodeId(1), NodeId(2)]);
}

async fn what_changed_since_is_all_that_changed(store: &Store) {
    let mut tx = store.read().await.unwrap();
    let base = tx.network(HOME).await.unwrap().unwrap().generation;
    assert!(tx.load(NetworkId(1), None).await.unwrap().is_none());
    drop(tx);
    insert(store, &node(HOME, 20)).await;
    let mut tx = store.write().await.unwrap();
    let network = tx.raise(HOME).await.unwrap();
    tx.delete_node(&network, NodeId(2)).await.unwrap();
    tx.commit().await.unwrap();

    let mut tx = store.read().await.unwrap();
    let since = tx.load(HOME, Some(base)).await.unwrap().unwrap();
    let ids: Vec<NodeId> = since.nodes.iter().map(|row| row.id).collect();
    assert_eq!((ids, since.removed), (vec![NodeId(20)], vec![NodeId(2)]));
    assert!(!since.complete && since.policy.is_none());
    let all = tx.load(HOME, None).await.unwrap().unwrap();
    let ids: Vec<NodeId> = all.nodes.iter().map(|row| row.id).collect();
    assert_eq!(
        (ids, all.complete, all.removed),
        (vec![NodeId(1), NodeId(20)], true, vec![])
    );
    assert!(all.policy.is_some());
    let ahead = Generation(all.network.generation.0 + 1);
    assert!(
        tx.load(HOME, Some(ahead)).await.unwrap().unwrap().complete,
        "a future base is none"
    );
}

fn token(reusable: bool) -> TokenRow {
    TokenRow {
        network: HOME,
        owner: Owner::User("ana@example.com".to_owned()),
        reusable,
        ephemeral: true,
        created: NOW,
        expires: Timestamp(NOW.0 + 1_000),
    }
}

async fn give(store: &Store, seed: u8, row: &TokenRow) -> TokenHash {
    let hash = TokenHash::of(&TokenSecret::from_bytes([seed; 20]));
    let mut tx = store.write().await.unwrap();
    tx.insert_token(hash, row).await.unwrap();
    tx.commit().await.unwrap();
    hash
}

async fn a_token_admits_as_often_as_it_says(store: &Store) {
    let (once, often) = (token(false), token(true));
    let (once_hash, often_hash) = (give(store, 1, &once).await, give(store, 2, &often).await);
    let unknown = TokenHash::of(&TokenSecret::from_bytes([3; 20]));
    let mut tx = store.write().await.unwrap();
    assert!(tx.token(once_hash, NOW).await.unwrap() == TokenState::Good(once.clone()));
    assert_eq!(
        tx.claim_token(once_hash, NOW).await.unwrap(),
        Some(once.clone())
    );
    assert_eq!(tx.claim_token(once_hash, NOW).await.unwrap(), None);
    assert!(tx.token(once_hash, NOW).await.unwrap() == TokenState::Used);
    for _ in 0..3 {
        assert_eq!(
            tx.claim_token(often_hash, NOW).await.unwrap(),
            Some(often.clone())
        );
    }
    assert_eq!(
        tx.claim_token(often_hash, often.expires).await.unwrap(),
        None
    );
    assert!(tx.token(often_hash, often.expires).await.unwrap() == TokenState::Expired);
    assert!(tx.token(unknown, NOW).await.unwrap() == TokenState::Unknown);
    assert_eq!(tx.claim_token(unknown, NOW).await.unwrap(), None);
}

async fn of_simultaneous_claims_one_wins(store: &Store) {
    let hash = give(store, 4, &token(false)).await;
    let claims = (0..32).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut tx = store.write().await.unwrap();
            let won = tx.claim_token(hash, NOW).await.unwrap().is_some();
            tx.commit().await.unwrap();
            won
        })
    });
    let mut winners = 0;
    for claim in claims.collect::<Vec<_>>() {
        winners += usize::from(claim.await.unwrap());
    }
    assert_eq!(winners, 1);
}

async fn presence_belongs_to_the_replica_that_holds_the_stream(store: &Store) {
    let id = NodeId(20);
    let later = Timestamp(NOW.0 + 10_000);
    let mut tx = store.write().await.unwrap();
    let network = tx.raise(HOME).await.unwrap();
    tx.renew_lease("a", later).await.unwrap();
    assert!(tx.set_online(&network, id, "a", NOW).await.unwrap());
    assert!(tx.node(HOME, id).await.unwrap().unwrap().online);
    assert!(
        !tx.set_online(&network, id, "b", NOW).await.unwrap(),
        "its peers see no news"
    );
    assert!(
        !tx.set_offline(&network, id, "a", NOW).await.unwrap(),
        "it moved to b"
    );
    let orphans = tx.orphans(NOW).await.unwrap();
    assert_eq!(orphans, [(HOME, id, "b".to_owned())], "b has no lease");
    tx.renew_lease("b", later).await.unwrap();
    assert_eq!(tx.orphans(NOW).await.unwrap(), []);
    tx.forget_replicas(Timestamp(later.0 + 1)).await.unwrap();
    assert_eq!(
        tx.orphans(NOW).await.unwrap(),
        [],
        "b still holds a node, a was forgotten"
    );
    assert_eq!(tx.orphans(Timestamp(later.0 + 1)).await.unwrap().len(), 1);
    assert!(tx.set_offline(&network, id, "b", later).await.unwrap());
    let row = tx.node(HOME, id).await.unwrap().unwrap();
    assert_eq!((row.online, row.last_seen), (false, later));

    // `n1` is not ephemeral any more; 20 is not; 21 is.
    tx.insert_node(&network, &node(HOME, 21)).await.unwrap();
    assert_eq!(tx.expired_ephemerals(NOW).await.unwrap(), []);
    let gone = tx.expired_ephemerals(Timestamp(NOW.0 + 1)).await.unwrap();
    assert_eq!(gone, [(HOME, NodeId(21)), (WORK, NodeId(1))]);
}

async fn the_audit_log_is_a_chain(store: &Store) {
    for subject in ["one", "two", "three"] {
        let mut tx = store.write().await.unwrap();
        let network = tx.raise(HOME).await.unwrap();
        let entry = AuditEntry {
            actor: "test",
            action: "test.note",
            subject,
            before: "",
            after: "é",
        };
        tx.append_audit(&network, NOW, &entry).await.unwrap();
        tx.commit().await.unwrap();
    }
    let (rows, chain) = store.read().await.unwrap().audit(HOME).await.unwrap();
    assert_eq!(chain, Chain::Whole);
    let subjects: Vec<&str> = rows.iter().map(|row| row.subject.as_str()).collect();
    assert_eq!(subjects, ["one", "two", "three"]);
    let (rows, chain) = store.read().await.unwrap().audit(WORK).await.unwrap();
    assert_eq!((rows.len(), chain), (0, Chain::Whole));
}
