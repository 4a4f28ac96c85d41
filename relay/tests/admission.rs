//! Who is let in, and whom they can reach then.

use crate::client::{Client, Login, join_with, key, parse};
use crate::place::{Place, networks, secret};
use proto::derp::{Frame, GoneReason};
use proto::id::NetworkId;
use proto::permit::Permit;
use relay::config::Certificate;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::TcpStream;

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_secs()
}

fn permit(signer: u8, network: u64, node: u8, expires: u64) -> Option<Permit> {
    Some(secret(signer).permit(NetworkId(network), key(node), expires))
}

async fn join(
    addr: SocketAddr,
    node: u8,
    permit: Option<Permit>,
) -> Result<Client<TcpStream>, String> {
    let login = Login {
        permit,
        ..Login::default()
    };
    join_with(addr, node, login).await
}

#[tokio::test]
async fn without_a_good_permit_nobody_comes_in_and_hears_why() {
    let place = Place::start(networks(), Certificate::Off, 0);
    let later = now() + 3_600;
    let refused = [
        (None, "with a permit"),
        (permit(1, 1, 8, later), "another node's"),
        (permit(1, 1, 7, now() - 1), "has expired"),
        (permit(1, 2, 7, later), "not signed by a coordinator"),
        (permit(9, 1, 7, later), "not signed by a coordinator"),
        (permit(1, 3, 7, later), "does not serve"),
    ];
    let count = refused.len() as u64;
    for (permit, why) in refused {
        let said = join(place.addr(), 7, permit).await.err().unwrap();
        assert!(said.contains(why), "{said}");
    }
    assert_eq!(place.metric("weir_relay_logins_refused_total").await, count);
    assert_eq!(place.metric("weir_relay_logins_total").await, 0);
    join(place.addr(), 7, permit(1, 1, 7, later)).await.unwrap();
}

#[tokio::test]
async fn nodes_of_two_networks_are_not_there_for_each_other() {
    let place = Place::start(networks(), Certificate::Off, 0);
    let later = now() + 3_600;
    let at = place.addr();
    let mut one = join(at, 1, permit(1, 1, 1, later)).await.unwrap();
    let mut mate = join(at, 2, permit(1, 1, 2, later)).await.unwrap();
    let mut other = join(at, 3, permit(2, 2, 3, later)).await.unwrap();
    // The same key in the other network is another node, and no duplicate.
    let mut twin = join(at, 1, permit(2, 2, 1, later)).await.unwrap();
    other.send_packet(mate.key, b"evil").await;
    let peer = mate.key;
    let reason = GoneReason::NotHere;
    let gone = format!("{:?}", Frame::PeerGone { peer, reason });
    assert_eq!(other.until_pong().await, [gone]);
    mate.send_packet(key(1), b"to one").await;
    other.send_packet(key(1), b"to the twin").await;
    assert_eq!(one.packet().await, (mate.key, b"to one".to_vec()));
    assert_eq!(twin.packet().await, (other.key, b"to the twin".to_vec()));
    assert!(mate.until_pong().await.is_empty());
    assert!(one.until_pong().await.is_empty());
}

#[tokio::test]
async fn a_session_ends_with_its_permit_and_the_node_may_come_back_with_the_next() {
    let place = Place::start(networks(), Certificate::Off, 0);
    let soon = now() + 2;
    let mut client = join(place.addr(), 1, permit(1, 1, 1, soon)).await.unwrap();
    let told = client.next().await.unwrap();
    let Frame::Restarting { reconnect_in, .. } = parse(&told) else {
        panic!("{:?}", parse(&told));
    };
    assert_eq!(reconnect_in, Duration::ZERO);
    assert_eq!(client.next().await, None);
    assert!(now() >= soon - 1);
    assert!(join(place.addr(), 1, permit(1, 1, 1, soon)).await.is_err());
    let next = permit(1, 1, 1, soon + 100);
    assert!(join(place.addr(), 1, next).await.is_ok());
}

#[tokio::test]
async fn a_login_with_a_stolen_key_does_not_open() {
    let place = Place::start(networks(), Certificate::Off, 0);
    // Node 8 seals with its own key and claims to be node 7, with node 7's permit.
    let login = Login {
        permit: permit(1, 1, 7, now() + 3_600),
        claim: Some(key(7)),
        ..Login::default()
    };
    let said = join_with(place.addr(), 8, login).await.err().unwrap();
    assert_eq!(said, "the end");
    assert_eq!(place.metric("weir_relay_logins_broken_total").await, 1);
}
