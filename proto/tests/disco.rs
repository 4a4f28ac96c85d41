//! Discovery's packets: byte vectors, round trips, garbage, other people's keys.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use data_encoding::HEXLOWER;
use proptest::prelude::*;
use proto::disco::{
    self, DiscoBox, DiscoError, MAX_PADDING, MIN_BYTES, Message, PING_BYTES, Took, TxId,
};
use proto::key::{DiscoKey, DiscoSecret, NodeKey};
use proto::netmap::MAX_ENDPOINTS_PER_NODE;
use std::net::SocketAddr;

const TX: TxId = TxId([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
const NODE: NodeKey = NodeKey([0xaa; 32]);
/// A whole packet, from the secret of 32 times 1 to that of 32 times 2, with a nonce of 24 times 3:
/// a ping of node `NODE` with two zeros behind it.
const PACKET: &str = "5453f09f92aca4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a20903030303\
    0303030303030303030303030303030303030303851a05018823143315ab9ab78d4f03ece22b7e0d2812\
    3fa823082f7d71a66a5160f00a1fc2bea04efcf119ecd8cfd099b8306e1ea8420b05f19fefb5b6752ee5";

fn bytes(hex: &str) -> Vec<u8> {
    HEXLOWER.decode(hex.replace(' ', "").as_bytes()).unwrap()
}

fn secret(seed: u8) -> DiscoSecret {
    DiscoSecret::from_bytes([seed; 32])
}

/// The boxes of two nodes for each other.
fn pair() -> (DiscoBox, DiscoBox) {
    let (a, b) = (secret(1), secret(2));
    let open = |us: &DiscoSecret, peer| DiscoBox::new(us, peer).unwrap();
    (open(&a, b.public()), open(&b, a.public()))
}

fn messages() -> Vec<(&'static str, Message)> {
    let node = Some(NODE);
    let seen = |text: &str| text.parse().unwrap();
    vec![
        (
            "01 00 0102030405060708090a0b0c",
            Message::Ping {
                tx: TX,
                node: None,
                padding: 0,
            },
        ),
        (
            "01 00 0102030405060708090a0b0c \
             aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 0000",
            Message::Ping {
                tx: TX,
                node,
                padding: 2,
            },
        ),
        (
            "02 00 0102030405060708090a0b0c 00000000000000000000ffffc0000201 04d2",
            Message::Pong {
                tx: TX,
                seen: seen("192.0.2.1:1234"),
                took: None,
            },
        ),
        (
            "02 00 0102030405060708090a0b0c 00000000000000000000ffffc0000201 04d2 \
             77 0000000000000400 00000007",
            Message::Pong {
                tx: TX,
                seen: seen("192.0.2.1:1234"),
                took: Some(Took {
                    bytes: 1024,
                    ago_ms: 7,
                }),
            },
        ),
        (
            "02 00 0102030405060708090a0b0c 20010db8000000000000000000000001 0007",
            Message::Pong {
                tx: TX,
                seen: seen("[2001:db8::1]:7"),
                took: None,
            },
        ),
        (
            "03 00",
            Message::CallMeMaybe {
                endpoints: Vec::new(),
            },
        ),
        (
            "03 00 00000000000000000000ffffc0000201 04d2 20010db8000000000000000000000001 0007",
            Message::CallMeMaybe {
                endpoints: vec![seen("192.0.2.1:1234"), seen("[2001:db8::1]:7")],
            },
        ),
        ("04 00", Message::Unknown(4)),
    ]
}

#[test]
fn every_kind_has_these_bytes() {
    for (text, message) in messages() {
        assert_eq!(HEXLOWER.encode(&message.encode()), text.replace(' ', ""));
        assert_eq!(Message::decode(&bytes(text)), Some(message));
    }
}

#[test]
fn a_packet_has_these_bytes() {
    let (a, b) = pair();
    let (node, padding) = (Some(NODE), 2);
    let message = Message::Ping {
        tx: TX,
        node,
        padding,
    };
    let packet = a.seal([3; 24], &message);
    assert_eq!(HEXLOWER.encode(&packet), PACKET);
    assert_eq!(packet.len(), PING_BYTES + 2);
    assert_eq!(disco::sender(&packet), Some(b.peer()));
    assert_eq!(b.open(&packet), Ok(message));
}

#[test]
fn bodies_may_grow_and_later_versions_be_read() {
    let grown = bytes("02 07 0102030405060708090a0b0c 00000000000000000000ffffc0000201 04d2 99");
    let seen = "192.0.2.1:1234".parse().unwrap();
    assert_eq!(
        Message::decode(&grown),
        Some(Message::Pong {
            tx: TX,
            seen,
            took: None
        })
    );
    let cut = bytes("03 00 00000000000000000000ffffc0000201 04d2 00000000");
    let endpoints = vec![seen];
    assert_eq!(
        Message::decode(&cut),
        Some(Message::CallMeMaybe { endpoints })
    );
}

#[test]
fn what_is_short_is_refused_at_every_length() {
    let (a, b) = pair();
    for (text, message) in messages() {
        let whole = bytes(text);
        for length in 0..whole.len() {
            // It may become another message, never this one.
            assert_ne!(Message::decode(&whole[..length]), Some(message.clone()));
        }
        let packet = a.seal([3; 24], &message);
        for length in 0..packet.len() {
            assert!(b.open(&packet[..length]).is_err(), "{length}");
        }
    }
    for short in [
        "",
        "01",
        "01 00 0102030405060708090a0b",
        "02 00 0102030405060708090a0b0c 00",
    ] {
        assert_eq!(Message::decode(&bytes(short)), None, "{short}");
    }
}

#[test]
fn only_the_peers_box_opens() {
    let (a, b) = pair();
    let message = Message::CallMeMaybe {
        endpoints: Vec::new(),
    };
    let packet = a.seal([3; 24], &message);
    let stranger = DiscoBox::new(&secret(3), secret(1).public()).unwrap();
    assert_eq!(stranger.open(&packet), Err(DiscoError::Box));
    // Who names another's key has no box that opens.
    let mut forged = DiscoBox::new(&secret(3), secret(2).public())
        .unwrap()
        .seal([3; 24], &message);
    assert_eq!(b.open(&forged), Err(DiscoError::Box));
    forged[6..38].copy_from_slice(&secret(1).public().0);
    assert_eq!(b.open(&forged), Err(DiscoError::Box));
    let mut other = packet.clone();
    other[0] = b'X';
    assert_eq!(b.open(&other), Err(DiscoError::Magic));
    assert_eq!(b.open(&vec![0; 70_000]), Err(DiscoError::TooLong));
    assert!(DiscoBox::new(&secret(1), DiscoKey([0; 32])).is_none());
}

#[test]
fn limits_hold_for_what_is_sent_and_for_what_is_read() {
    let endpoint: SocketAddr = "192.0.2.1:1".parse().unwrap();
    let many = |count| Message::CallMeMaybe {
        endpoints: vec![endpoint; count],
    };
    let most = many(MAX_ENDPOINTS_PER_NODE);
    assert_eq!(many(1_000).encode(), most.encode());
    let mut wire = most.encode();
    wire.extend([7; 18]);
    assert_eq!(Message::decode(&wire), Some(most));

    let ping = |padding| Message::Ping {
        tx: TX,
        node: Some(NODE),
        padding,
    };
    assert_eq!(ping(u16::MAX).encode(), ping(MAX_PADDING).encode());
    let (a, _) = pair();
    assert_eq!(a.seal([3; 24], &ping(u16::MAX)).len(), 9_000);
}

#[test]
fn discovery_is_told_from_wireguard_and_stun() {
    let (a, _) = pair();
    let packet = a.seal(
        [3; 24],
        &Message::CallMeMaybe {
            endpoints: Vec::new(),
        },
    );
    assert!(disco::is_disco(&packet));
    assert!(!disco::is_disco(&packet[..MIN_BYTES - 1]));
    for kind in 1..=4 {
        let mut wireguard = vec![0; 148];
        wireguard[0] = kind;
        assert!(!disco::is_disco(&wireguard));
    }
    assert!(!disco::is_disco(&proto::stun::request([0; 12])));
}

fn any_message() -> impl Strategy<Value = Message> {
    let endpoint = (any::<[u8; 16]>(), any::<u16>())
        .prop_map(|(ip, port)| SocketAddr::new(std::net::Ipv6Addr::from(ip).to_canonical(), port));
    let tx = any::<[u8; 12]>().prop_map(TxId);
    let node = any::<[u8; 32]>().prop_map(|key| Some(NodeKey(key)));
    prop_oneof![
        (tx, node, 0..=MAX_PADDING).prop_map(|(tx, node, padding)| Message::Ping {
            tx,
            node,
            padding
        }),
        (
            any::<[u8; 12]>(),
            endpoint.clone(),
            any::<Option<(u64, u32)>>()
        )
            .prop_map(|(tx, seen, took)| Message::Pong {
                tx: TxId(tx),
                seen,
                took: took.map(|(bytes, ago_ms)| Took { bytes, ago_ms }),
            }),
        prop::collection::vec(endpoint, 0..=MAX_ENDPOINTS_PER_NODE)
            .prop_map(|endpoints| Message::CallMeMaybe { endpoints }),
    ]
}

proptest! {
    #[test]
    fn packets_round_trip_both_ways(message in any_message(), nonce: [u8; 24]) {
        let (a, b) = pair();
        prop_assert_eq!(b.open(&a.seal(nonce, &message)), Ok(message.clone()));
        prop_assert_eq!(a.open(&b.seal(nonce, &message)), Ok(message));
    }

    #[test]
    fn what_is_read_is_written_the_same(plain: Vec<u8>) {
        let Some(message) = Message::decode(&plain) else { return Ok(()) };
        prop_assert_eq!(Message::decode(&message.encode()), Some(message));
    }

    #[test]
    fn no_packet_panics_and_no_altered_one_opens(
        packet: Vec<u8>, message in any_message(), place: prop::sample::Index, flip in 1..=255u8,
    ) {
        let (a, b) = pair();
        prop_assert!(b.open(&packet).is_err());
        let mut sealed = a.seal([9; 24], &message);
        let place = place.index(sealed.len());
        sealed[place] ^= flip;
        prop_assert!(b.open(&sealed).is_err());
    }
}
