//! Strangers and broken clients: whatever they send, the relay goes on for the others.

use crate::client::{join, key};
use crate::place::Place;
use proto::key::RelayKey;
use relay::config::RegionRelay;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// One stream a line, in hexadecimal digits; what begins with `#` is for people.
const STREAMS: &str = include_str!("../../proto/tests/corpus/derp.hex");

fn streams() -> Vec<Vec<u8>> {
    let lines = STREAMS.lines().filter(|line| !line.starts_with('#'));
    let bytes = |line: &str| data_encoding::HEXLOWER.decode(line.as_bytes()).unwrap();
    lines.map(bytes).collect()
}

/// Sends `bytes` and waits for the end that the relay makes of it, or makes one.
async fn say(addr: std::net::SocketAddr, bytes: &[u8]) {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    // The relay may have ended it by now.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_stream_of_bytes_disturbs_the_others() {
    // One of the strangers has a relay's key.
    let relay = RegionRelay {
        addr: "127.0.0.1:1".to_owned(),
        key: RelayKey(key(200).0),
        certificate: None,
        plain: true,
    };
    let place = Place::with(|config| config.region = vec![relay]);
    let (mut a, mut b) = (join(place.addr(), 101).await, join(place.addr(), 102).await);
    let upgrade = b"GET /derp HTTP/1.1\r\nUpgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n";
    for stream in streams() {
        // At the door, in place of a login, from a client that is logged in, and from a relay; cut in
        // each place.
        for length in (0..=stream.len()).step_by(1 + stream.len() / 8) {
            let cut = &stream[..length];
            say(place.addr(), cut).await;
            say(place.addr(), &[upgrade, cut].concat()).await;
            join(place.addr(), 1).await.say_last(cut).await;
            join(place.addr(), 200).await.say_last(cut).await;
        }
    }
    a.send_packet(key(102), b"still here").await;
    assert_eq!(b.packet().await, (key(101), b"still here".to_vec()));
    assert!(b.until_pong().await.is_empty());
    assert!(place.metric("weir_relay_logins_broken_total").await > 0);
}
