//! Two relays of one region: whoever is at the one is reached from the other.

use crate::client::{Client, Login, join, join_with, key};
use crate::place::{Place, networks, own_address, secret};
use proto::derp::{DISCO_MAGIC, DISCO_MIN_BYTES, Frame};
use proto::id::NetworkId;
use proto::key::{NodeKey, RelayKey};
use relay::admit::Admission;
use relay::config::{Certificate, Config, RegionRelay};
use relay::server::Server;
use relay::tls::{Identity, relay_secret};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::net::TcpStream;

/// Longest wait for a relay to find another one.
const PATIENCE: Duration = Duration::from_secs(20);

/// A relay whose address and key are known before it runs.
struct Planned {
    dir: TempDir,
    addr: SocketAddr,
    relay: RegionRelay,
    certificate: Certificate,
}

impl Planned {
    fn new(certificate: Certificate) -> Self {
        let addr = SocketAddr::from((own_address(), 4_430));
        let dir = tempfile::tempdir().unwrap();
        let pin = match certificate {
            Certificate::Own => Some(Identity::load_or_create(dir.path()).unwrap().fingerprint()),
            Certificate::Given { .. } | Certificate::Acme(_) | Certificate::Off => None,
        };
        let relay = RegionRelay {
            addr: addr.to_string(),
            key: RelayKey(relay_secret(dir.path()).unwrap().public().0),
            certificate: pin,
            plain: pin.is_none(),
        };
        Self {
            dir,
            addr,
            relay,
            certificate,
        }
    }

    fn start(&self, admission: Admission, region: &[&Planned]) -> Server {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let config = Config {
            state_dir: self.dir.path().to_owned(),
            listen: self.addr,
            stun_listen: any,
            status_listen: any,
            certificate: self.certificate.clone(),
            admission,
            rate: 0,
            region: region.iter().map(|other| other.relay.clone()).collect(),
        };
        Server::start(config).unwrap()
    }
}

/// Sends until something arrives: the relays find each other in their own time.
async fn until_it_arrives<S, T>(from: &mut Client<S>, to: &mut Client<T>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let start = Instant::now();
    loop {
        from.send_packet(to.key, b"are you there").await;
        from.until_pong().await;
        // Two hops and back are behind us when the other's pong comes after what was sent.
        let came = to.until_pong().await;
        if came.iter().any(|frame| frame.starts_with("RecvPacket")) {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "nothing arrives");
    }
    // What is still under way.
    while !to.until_pong().await.is_empty() {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_two_relays_reach_each_other() {
    let (one, two) = (
        Planned::new(Certificate::Off),
        Planned::new(Certificate::Own),
    );
    // Each names both: a relay skips itself.
    let region = [&one, &two];
    let (here, there) = (
        one.start(Admission::Open, &region),
        two.start(Admission::Open, &region),
    );
    let mut a = join(here.addr, 1).await;
    let (stream, _) = crate::client::tls(there.addr).await;
    let mut b = Client::login(stream, 2, Login::default()).await.unwrap();
    until_it_arrives(&mut a, &mut b).await;
    until_it_arrives(&mut b, &mut a).await;
    let mut disco = DISCO_MAGIC.to_vec();
    disco.resize(DISCO_MIN_BYTES, 0);
    for packet in [disco, vec![], vec![1; 1_200], vec![2; 64 << 10]] {
        a.send_packet(b.key, &packet).await;
        assert_eq!(b.packet().await, (a.key, packet.clone()));
        b.send_packet(a.key, &packet).await;
        assert_eq!(a.packet().await, (b.key, packet));
    }
    // Who has left is not here any more.
    let gone = b.key;
    drop(b);
    let start = Instant::now();
    loop {
        a.send_packet(gone, b"x").await;
        if !a.until_pong().await.is_empty() {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "nobody says that it left");
    }
    here.stop().await;
    there.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn networks_stay_apart_between_relays() {
    let (one, two) = (
        Planned::new(Certificate::Off),
        Planned::new(Certificate::Off),
    );
    let here = one.start(networks(), &[&two]);
    let there = two.start(networks(), &[&one]);
    let enter = async |addr, network: u64, seed: u8| {
        let permit = secret(network as u8).permit(NetworkId(network), key(seed), u64::MAX);
        let login = Login {
            permit: Some(permit),
            ..Login::default()
        };
        let client: Client<TcpStream> = join_with(addr, seed, login).await.unwrap();
        client
    };
    let mut a = enter(here.addr, 1, 1).await;
    let mut mate = enter(there.addr, 1, 2).await;
    let mut twin = enter(there.addr, 2, 2).await;
    let mut other = enter(here.addr, 2, 3).await;
    until_it_arrives(&mut a, &mut mate).await;
    until_it_arrives(&mut other, &mut twin).await;
    // The same key in two networks: each hears its own alone.
    a.send_packet(key(2), b"to the mate").await;
    other.send_packet(key(2), b"to the twin").await;
    assert_eq!(mate.packet().await, (key(1), b"to the mate".to_vec()));
    assert_eq!(twin.packet().await, (key(3), b"to the twin".to_vec()));
    // And nobody reaches across.
    mate.send_packet(key(3), b"evil").await;
    assert!(mate.until_pong().await[0].contains("NotHere"));
    assert!(other.until_pong().await.is_empty());
    assert!(mate.until_pong().await.is_empty() && twin.until_pong().await.is_empty());
    // One of the twins leaves, and only that one is gone.
    drop(twin);
    let start = Instant::now();
    loop {
        other.send_packet(key(2), b"x").await;
        if !other.until_pong().await.is_empty() {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "nobody says that it left");
    }
    a.send_packet(key(2), b"still there").await;
    assert_eq!(mate.packet().await.1, b"still there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_lost_is_found_again() {
    let (one, two) = (
        Planned::new(Certificate::Off),
        Planned::new(Certificate::Off),
    );
    let here = one.start(Admission::Open, &[&two]);
    let there = two.start(Admission::Open, &[&one]);
    let (mut a, mut b) = (join(here.addr, 1).await, join(there.addr, 2).await);
    until_it_arrives(&mut a, &mut b).await;
    there.stop().await;
    let start = Instant::now();
    loop {
        a.send_packet(b.key, b"x").await;
        if !a.until_pong().await.is_empty() {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "nobody says that it is gone");
    }
    let _there = two.start(Admission::Open, &[&one]);
    let mut b = join(two.addr, 2).await;
    until_it_arrives(&mut a, &mut b).await;
    until_it_arrives(&mut b, &mut a).await;
}

/// A relay that only one side knows is no relay of the region: its key admits it to nothing.
#[tokio::test]
async fn a_stranger_is_no_relay() {
    let known = Planned::new(Certificate::Off);
    let place = Place::with(|config| {
        config.admission = networks();
        config.region = vec![known.relay.clone()];
    });
    // Somebody who says that it is that relay, without its secret.
    let login = Login {
        claim: Some(NodeKey(known.relay.key.0)),
        ..Login::default()
    };
    let said = join_with(place.addr(), 7, login).await.err();
    assert_eq!(said.as_deref(), Some("the end"));
    // The relay itself is let in, may watch, and may not speak as a node.
    let seed = relay_secret(known.dir.path()).unwrap();
    let stream = TcpStream::connect(place.addr()).await.unwrap();
    let mut relay = Client::login_as(stream, &seed, Login::default())
        .await
        .unwrap();
    relay.send(Frame::WatchConns).await;
    assert!(relay.until_pong().await.is_empty());
    relay.send_packet(key(1), b"as a node").await;
    assert_eq!(relay.next().await, None);
}
