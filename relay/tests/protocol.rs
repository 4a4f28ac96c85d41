//! What is said on the wire: opening, login, frames, the pages beside the stream, STUN.

use crate::client::{Client, Login, join, join_with, key, parse, tls};
use crate::place::{Place, get};
use proto::derp::{Frame, GoneReason, VERSION};
use proto::key::RelayKey;
use relay::admit::Admission;
use relay::config::Certificate;
use relay::switch::DUPLICATE_TEXT;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

#[tokio::test]
async fn a_packet_arrives_with_its_senders_key_at_any_size() {
    let place = Place::open();
    let (mut a, mut b) = (join(place.addr(), 1).await, join(place.addr(), 2).await);
    assert_eq!(a.relay, place.server.key);
    assert_eq!(a.info.version, VERSION);
    for size in [0, 1, 1_200, 64 << 10] {
        let packet = vec![size as u8; size];
        a.send_packet(b.key, &packet).await;
        assert_eq!(b.packet().await, (a.key, packet));
    }
    b.send_packet(a.key, b"and back").await;
    assert_eq!(a.packet().await, (b.key, b"and back".to_vec()));
}

#[tokio::test]
async fn a_client_in_a_hurry_gets_a_frame_first() {
    let place = Place::open();
    let login = Login {
        fast: true,
        ..Login::default()
    };
    let mut fast = join_with(place.addr(), 1, login).await.unwrap();
    let mut other = join(place.addr(), 2).await;
    fast.send_packet(other.key, b"x").await;
    assert_eq!(other.packet().await, (key(1), b"x".to_vec()));
}

#[tokio::test]
async fn over_tls_the_chain_ends_with_the_relays_key() {
    let place = Place::start(Admission::Open, Certificate::Own, 0);
    let (stream, chain) = tls(place.addr()).await;
    let hex = data_encoding::HEXLOWER.encode(&place.server.key.0);
    let name = format!("derpkey{hex}");
    let [_, meta] = chain.as_slice() else {
        panic!("{} certificates", chain.len());
    };
    let named = meta.windows(name.len()).any(|part| part == name.as_bytes());
    assert!(named, "the meta certificate does not name the relay's key");
    // DER of the version as the serial number.
    assert!(meta.windows(3).any(|part| part == [2, 1, VERSION as u8]));
    let login = Login {
        fast: true,
        ..Login::default()
    };
    let mut a = Client::login(stream, 1, login).await.unwrap();
    assert_eq!(RelayKey(a.relay.0), place.server.key);
    let (stream, _) = tls(place.addr()).await;
    let mut b = Client::login(stream, 2, Login::default()).await.unwrap();
    for number in 0..200_u8 {
        a.send_packet(b.key, &[number; 1_200]).await;
        assert_eq!(b.packet().await, (a.key, vec![number; 1_200]));
    }
}

#[tokio::test]
async fn whoever_is_not_here_is_said_to_be_gone() {
    let place = Place::open();
    let (mut a, mut b) = (join(place.addr(), 1).await, join(place.addr(), 2).await);
    a.send_packet(key(3), b"x").await;
    let gone = |peer, reason| format!("{:?}", Frame::PeerGone { peer, reason });
    assert_eq!(a.until_pong().await, [gone(key(3), GoneReason::NotHere)]);
    // B wrote to A, so A hears that B left.
    b.send_packet(a.key, b"hello").await;
    assert_eq!(a.packet().await.0, b.key);
    drop(b);
    let told = a.next().await.unwrap();
    let peer = key(2);
    let reason = GoneReason::Disconnected;
    assert_eq!(parse(&told), Frame::PeerGone { peer, reason });
    // However much is sent to nobody, the notices are few.
    for _ in 0..500 {
        a.send_packet(key(3), b"x").await;
    }
    assert!(a.until_pong().await.len() < 200);
    assert_eq!(
        place
            .metric("weir_relay_packets_dropped_total{reason=\"not_here\"}")
            .await,
        501
    );
}

#[tokio::test]
async fn frames_of_other_versions_change_nothing() {
    let place = Place::open();
    let mut a = join(place.addr(), 1).await;
    for frame in [
        Frame::Unknown(0x7f),
        Frame::KeepAlive,
        Frame::Pong([1; 8]),
        Frame::Health("x"),
        Frame::NotePreferred(true),
    ] {
        a.send(frame).await;
    }
    assert!(a.until_pong().await.is_empty());
    assert_eq!(place.metric("weir_relay_home_clients").await, 1);
    a.send(Frame::NotePreferred(false)).await;
    a.until_pong().await;
    assert_eq!(place.metric("weir_relay_home_clients").await, 0);
}

#[tokio::test]
async fn what_only_relays_may_ask_ends_a_clients_session() {
    let place = Place::open();
    let (src, dst, packet) = (key(2), key(3), &b"forged"[..]);
    let mut victim = join(place.addr(), 3).await;
    for frame in [
        Frame::WatchConns,
        Frame::ClosePeer(dst),
        Frame::ForwardPacket { src, dst, packet },
    ] {
        let mut client = join(place.addr(), 1).await;
        client.send(frame).await;
        assert_eq!(client.next().await, None, "{frame:?}");
    }
    assert!(victim.until_pong().await.is_empty());
}

#[tokio::test]
async fn a_second_connection_with_one_key_is_told_of_and_takes_over() {
    let place = Place::open();
    let mut old = join(place.addr(), 1).await;
    let mut new = join(place.addr(), 1).await;
    let mut peer = join(place.addr(), 2).await;
    let told = old.next().await.unwrap();
    assert_eq!(parse(&told), Frame::Health(DUPLICATE_TEXT));
    let told = new.next().await.unwrap();
    assert_eq!(parse(&told), Frame::Health(DUPLICATE_TEXT));
    peer.send_packet(key(1), b"to the newest").await;
    assert_eq!(new.packet().await.1, b"to the newest");
    drop(old);
    let told = new.next().await.unwrap();
    assert_eq!(parse(&told), Frame::Health(""));
}

#[tokio::test]
async fn a_stopping_relay_says_so_within_a_second() {
    let place = Place::open();
    let mut clients = Vec::new();
    for seed in 1..=20 {
        clients.push(join(place.addr(), seed).await);
    }
    let start = Instant::now();
    let stop = tokio::spawn(place.server.stop());
    for client in &mut clients {
        let told = client.next().await.unwrap();
        assert!(matches!(parse(&told), Frame::Restarting { .. }), "{told:?}");
        assert_eq!(client.next().await, None);
    }
    stop.await.unwrap();
    let took = start.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[tokio::test]
async fn the_pages_beside_the_stream() {
    let place = Place::open();
    let _client = join(place.addr(), 1).await;
    let health = get(place.addr(), "/health").await;
    assert!(health.starts_with("HTTP/1.1 200 "), "{health}");
    assert!(health.contains(r#""clients":1"#), "{health}");
    assert!(
        get(place.addr(), "/derp/probe")
            .await
            .starts_with("HTTP/1.1 200 ")
    );
    assert!(
        get(place.addr(), "/derp")
            .await
            .starts_with("HTTP/1.1 426 ")
    );
    assert!(
        get(place.addr(), "/generate_204")
            .await
            .starts_with("HTTP/1.1 204 ")
    );
    // Counters are for the machine's owner.
    assert!(
        get(place.addr(), "/metrics")
            .await
            .starts_with("HTTP/1.1 404 ")
    );
    assert_eq!(place.metric("weir_relay_logins_total").await, 1);
}

#[tokio::test]
async fn stun_tells_the_address_it_sees_and_ignores_the_rest() {
    let place = Place::open();
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(place.server.stun_addr).await.unwrap();
    socket.send(b"no stun at all").await.unwrap();
    let question = proto::stun::request([9; 12]);
    socket.send(&question).await.unwrap();
    let mut answer = [0; 100];
    let length = socket.recv(&mut answer).await.unwrap();
    let seen = proto::stun::parse_response(&answer[..length]).unwrap();
    assert_eq!(seen, ([9; 12], socket.local_addr().unwrap()));
    assert_eq!(place.metric("weir_relay_stun_ignored_total").await, 1);
}

#[tokio::test]
async fn one_wildcard_serves_both_families_and_stun_tells_each_its_own() {
    let any: SocketAddr = "[::]:0".parse().unwrap();
    let place = Place::with(|config| (config.listen, config.stun_listen) = (any, any));
    let locals: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    for local in locals {
        let Ok(socket) = UdpSocket::bind((local, 0)).await else {
            // Only a machine without IPv6 has no such address.
            assert!(local.is_ipv6());
            continue;
        };
        let mut stream = TcpStream::connect((local, place.addr().port()))
            .await
            .unwrap();
        stream
            .write_all(b"GET /generate_204 HTTP/1.1\r\n\r\n")
            .await
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");

        let question = proto::stun::request([9; 12]);
        let at = (local, place.server.stun_addr.port());
        socket.send_to(&question, at).await.unwrap();
        let mut answer = [0; 100];
        let length = socket.recv(&mut answer).await.unwrap();
        let seen = proto::stun::parse_response(&answer[..length]).unwrap();
        assert_eq!(seen, ([9; 12], socket.local_addr().unwrap()));
    }
}

#[tokio::test]
async fn stun_answers_from_the_address_that_was_asked() {
    for any in ["[::]:0", "0.0.0.0:0"] {
        let any: SocketAddr = any.parse().unwrap();
        let place = Place::with(|config| config.stun_listen = any);
        let port = place.server.stun_addr.port();
        for asked in ["127.0.0.1", "127.0.0.2", "127.9.9.9"] {
            // Connected, so that it hears nobody else.
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            socket.connect((asked, port)).await.unwrap();
            socket.send(&proto::stun::request([7; 12])).await.unwrap();
            let mut answer = [0; 100];
            let heard = tokio::time::timeout(Duration::from_secs(10), socket.recv(&mut answer));
            let length = heard.await.expect(asked).unwrap();
            let seen = proto::stun::parse_response(&answer[..length]).unwrap();
            assert_eq!(seen, ([7; 12], socket.local_addr().unwrap()));
        }
    }
}
