//! DERP's frames and login: byte vectors, round trips, garbage.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use data_encoding::HEXLOWER;
use proptest::prelude::*;
use proto::derp::{
    self, ClientInfo, Frame, FrameError, GoneReason, HEADER_BYTES, Header, LoginBox,
    MAX_INFO_BYTES, MAX_PACKET_BYTES, Sealed, ServerInfo, kind,
};
use proto::id::NetworkId;
use proto::key::{NodeKey, NodeSecret, RelayKey};
use proto::permit::PermitSecret;
use std::net::SocketAddr;
use std::time::Duration;

/// A published vector of NaCl's crypto_box: the message and, tag first, what becomes of it.
const NACL_PLAIN: &str = "be075fc53c81f2d5cf141316ebeb0c7b5228c52a4c62cbd44b66849b64244ffce5ecbaaf33bd751a1ac728d4\
    5e6c61296cdc3c01233561f41db66cce314adb310e3be8250c46f06dceea3a7fa1348057e2f6556ad6b1318a\
    024a838f21af1fde048977eb48f59ffd4924ca1c60902e52f0a089bc76897040e082f937763848645e0705";
const NACL_BOX: &str = "c03f27d188ef650cd12936913137bb17ed4c98c2648939e2e1d2e855470a7b8c632cabfd5ab3b3c2d313dc8c\
    9ecf5da173e1f9c318cdef1dced6d2519e695085e6b5c401a2bd5331442986c7076d412625497c4cb2fd94c6\
    f103961033b2c930d7e82e0341f29d3879bd6ab9d881ea3a1f365d634e653c6e171aac7fc1e76934d23be6f0\
    4a54010808dbf0f9bd30f63b68d026";

fn bytes(hex: &str) -> Vec<u8> {
    HEXLOWER.decode(hex.as_bytes()).unwrap()
}

fn array<const N: usize>(hex: &str) -> [u8; N] {
    bytes(hex).try_into().unwrap()
}

const A: NodeKey = NodeKey([0xaa; 32]);
const B: NodeKey = NodeKey([0xbb; 32]);

/// Every kind of frame and its bytes; `A` and `B` stand for the two keys above.
const VECTORS: &[(&str, Frame<'_>)] = &[
    (
        "01 00000028 44455250f09f9491 A",
        Frame::ServerKey(RelayKey(A.0)),
    ),
    (
        "02 0000004a A 010101010101010101010101010101010101010101010101 \
         0202020202020202020202020202020202 03",
        Frame::ClientInfo {
            key: A,
            sealed: Sealed {
                nonce: [1; 24],
                bytes: &[2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3],
            },
        },
    ),
    (
        "03 00000028 010101010101010101010101010101010101010101010101 \
         02020202020202020202020202020202",
        Frame::ServerInfo(Sealed {
            nonce: [1; 24],
            bytes: &[2; 16],
        }),
    ),
    (
        "04 00000023 B 616263",
        Frame::SendPacket {
            dst: B,
            packet: b"abc",
        },
    ),
    (
        "05 00000023 A 616263",
        Frame::RecvPacket {
            src: A,
            packet: b"abc",
        },
    ),
    ("06 00000000", Frame::KeepAlive),
    ("07 00000001 01", Frame::NotePreferred(true)),
    ("07 00000001 00", Frame::NotePreferred(false)),
    (
        "08 00000021 A 00",
        Frame::PeerGone {
            peer: A,
            reason: GoneReason::Disconnected,
        },
    ),
    (
        "08 00000021 A 01",
        Frame::PeerGone {
            peer: A,
            reason: GoneReason::NotHere,
        },
    ),
    (
        "09 00000020 A",
        Frame::PeerPresent {
            peer: A,
            addr: None,
            flags: None,
        },
    ),
    (
        "0a 00000043 A B 616263",
        Frame::ForwardPacket {
            src: A,
            dst: B,
            packet: b"abc",
        },
    ),
    ("10 00000000", Frame::WatchConns),
    (
        "57 0000000c 0102030405060708 0a 616263",
        Frame::Within {
            network: NetworkId(0x0102_0304_0506_0708),
            kind: kind::FORWARD_PACKET,
            body: b"abc",
        },
    ),
    ("11 00000020 A", Frame::ClosePeer(A)),
    (
        "12 00000008 0102030405060708",
        Frame::Ping([1, 2, 3, 4, 5, 6, 7, 8]),
    ),
    (
        "13 00000008 0102030405060708",
        Frame::Pong([1, 2, 3, 4, 5, 6, 7, 8]),
    ),
    ("14 00000004 6f6f7073", Frame::Health("oops")),
    ("14 00000000", Frame::Health("")),
    (
        "15 00000008 000003e8 00002710",
        Frame::Restarting {
            reconnect_in: Duration::from_secs(1),
            try_for: Duration::from_secs(10),
        },
    ),
];

fn vector(text: &str) -> Vec<u8> {
    let text = text
        .replace('A', &"aa".repeat(32))
        .replace('B', &"bb".repeat(32));
    bytes(&text.replace(' ', ""))
}

#[test]
fn every_kind_has_these_bytes() {
    for (text, frame) in VECTORS {
        let wire = vector(text);
        assert_eq!(HEXLOWER.encode(&frame.to_vec()), HEXLOWER.encode(&wire));
        assert_eq!(Frame::split(&wire), Ok(Some((*frame, wire.len()))));
    }
    let present = Frame::PeerPresent {
        peer: A,
        addr: Some("192.0.2.1:5".parse().unwrap()),
        flags: Some(2),
    };
    let wire = vector("09 00000033 A 00000000000000000000ffffc0000201 0005 02");
    assert_eq!(present.to_vec(), wire);
    assert_eq!(Frame::split(&wire), Ok(Some((present, wire.len()))));
}

#[test]
fn another_implementation_writes_the_same_bytes() {
    let (src, dst, packet) = (A, B, &b"abc"[..]);
    let nonce = [7; 24];
    let sealed = Sealed {
        nonce,
        bytes: b"a box of 17 bytes",
    };
    let frames = [
        ("server_key", Frame::ServerKey(RelayKey([0xcc; 32]))),
        ("client_info", Frame::ClientInfo { key: A, sealed }),
        ("server_info", Frame::ServerInfo(sealed)),
        ("send_packet", Frame::SendPacket { dst, packet }),
        ("recv_packet", Frame::RecvPacket { src, packet }),
        ("keep_alive", Frame::KeepAlive),
        (
            "peer_gone",
            Frame::PeerGone {
                peer: A,
                reason: GoneReason::NotHere,
            },
        ),
        (
            "peer_present",
            Frame::PeerPresent {
                peer: A,
                addr: Some("192.0.2.1:5".parse().unwrap()),
                flags: None,
            },
        ),
        ("forward_packet", Frame::ForwardPacket { src, dst, packet }),
        ("watch_conns", Frame::WatchConns),
        ("close_peer", Frame::ClosePeer(A)),
        ("ping", Frame::Ping([1, 2, 3, 4, 5, 6, 7, 8])),
        ("pong", Frame::Pong([1, 2, 3, 4, 5, 6, 7, 8])),
        ("health", Frame::Health("oops")),
        (
            "restarting",
            Frame::Restarting {
                reconnect_in: Duration::from_secs(1),
                try_for: Duration::from_secs(10),
            },
        ),
        ("note_preferred", Frame::NotePreferred(true)),
    ];
    let theirs = include_str!("corpus/derp_vectors.txt").lines();
    let theirs = theirs.filter(|line| !line.starts_with('#'));
    let theirs: Vec<&str> = theirs.collect();
    let ours = frames.map(|(name, frame)| format!("{name} {}", HEXLOWER.encode(&frame.to_vec())));
    assert_eq!(theirs, ours);
    for (line, (_, frame)) in theirs.iter().zip(frames) {
        let wire = bytes(line.split(' ').nth(1).unwrap());
        assert_eq!(Frame::split(&wire), Ok(Some((frame, wire.len()))));
    }
}

#[test]
fn bodies_may_grow_and_unknown_kinds_be_skipped() {
    for (text, frame) in VECTORS {
        let mut wire = vector(text);
        let carries_the_rest = matches!(
            frame.kind(),
            kind::CLIENT_INFO
                | kind::SERVER_INFO
                | kind::SEND_PACKET
                | kind::RECV_PACKET
                | kind::FORWARD_PACKET
                | kind::WITHIN
                | kind::HEALTH
        );
        if carries_the_rest {
            continue;
        }
        wire.push(9);
        let length = wire.len() - HEADER_BYTES;
        let kind = frame.kind();
        wire[..HEADER_BYTES].copy_from_slice(&Header { kind, length }.encode());
        assert_eq!(Frame::split(&wire), Ok(Some((*frame, wire.len()))));
    }
    let unknown = vector("7f 00000002 0000");
    assert_eq!(Frame::split(&unknown), Ok(Some((Frame::Unknown(0x7f), 7))));
    // Relays of the first days gave no reason.
    let gone = Frame::PeerGone {
        peer: A,
        reason: GoneReason::Disconnected,
    };
    assert_eq!(Frame::split(&vector("08 00000020 A")), Ok(Some((gone, 37))));
}

#[test]
fn what_is_cut_is_waited_for_and_what_is_short_is_refused() {
    for (text, frame) in VECTORS {
        let wire = vector(text);
        for length in 0..wire.len() {
            assert_eq!(Frame::split(&wire[..length]), Ok(None), "{frame:?}");
        }
    }
    for text in [
        "04 0000001f",
        "08 00000000",
        "12 00000007",
        "15 00000007",
        "07 00000000",
    ] {
        let mut wire = vector(text);
        wire.resize(64, 0);
        let kind = wire[0];
        assert_eq!(Frame::split(&wire), Err(FrameError::TooShort { kind }));
    }
    let stranger = vector("01 00000028 485454502f312e31 A");
    assert_eq!(Frame::split(&stranger), Err(FrameError::Magic));
}

#[test]
fn limits_hold_before_a_body_is_waited_for() {
    for (kind, length) in [
        (kind::SEND_PACKET, 32 + MAX_PACKET_BYTES),
        (kind::RECV_PACKET, 32 + MAX_PACKET_BYTES),
        (kind::FORWARD_PACKET, 64 + MAX_PACKET_BYTES),
        (kind::CLIENT_INFO, MAX_INFO_BYTES),
        (0x7f, MAX_INFO_BYTES),
    ] {
        let header = Header { kind, length };
        assert_eq!(Header::decode(header.encode()), Ok(header));
        let length = length + 1;
        let over = Header { kind, length };
        let refused = Err(FrameError::TooLong { kind, length });
        assert_eq!(Header::decode(over.encode()), refused);
    }
}

#[test]
fn the_box_is_that_of_nacl() {
    let alice = NodeSecret::from_bytes(array(
        "68f208412d8dd5db9d0c6d18512e86f0ec75665ab841372d57b042b27ef89d4c",
    ));
    let bob = NodeSecret::from_bytes(array(
        "b581fb5ae182a16f603f39270d4e3b95bc008310b727a11dd4e784a0044d461b",
    ));
    let nonce = array("69696ee955b62b73cd62bda875fc73d68219e0036b7a0b37");
    let (plain, sealed) = (bytes(NACL_PLAIN), bytes(NACL_BOX));
    let to_bob = LoginBox::new(&alice.agree(bob.public().0).unwrap());
    assert_eq!(
        HEXLOWER.encode(&to_bob.seal(nonce, &plain)),
        HEXLOWER.encode(&sealed)
    );
    let from_alice = LoginBox::new(&bob.agree(alice.public().0).unwrap());
    let bytes = &sealed;
    assert_eq!(from_alice.open(Sealed { nonce, bytes }), Some(plain));
    let mut altered = sealed.clone();
    altered[20] ^= 1;
    let bytes = &altered;
    assert_eq!(from_alice.open(Sealed { nonce, bytes }), None);
}

#[test]
fn infos_of_other_implementations_are_read() {
    // As the Go client writes it, as the Rust client does, and as little as may be.
    let go = r#"{"version":2,"CanAckPings":true,"IsProber":true,"AppName":"x"}"#;
    let info: ClientInfo = serde_json::from_str(go).unwrap();
    assert!(info.version == 2 && info.can_ack_pings && info.is_prober);
    let rust = r#"{"can_ack_pings":false,"is_prober":false,"mesh_key":"none","version":2}"#;
    let info: ClientInfo = serde_json::from_str(rust).unwrap();
    assert_eq!((info.version, info.weir_permit), (2, None));
    assert!(serde_json::from_str::<ClientInfo>("{}").is_ok());
    let go = r#"{"version":2,"TokenBucketBytesPerSecond":5,"TokenBucketBytesBurst":6}"#;
    let info: ServerInfo = serde_json::from_str(go).unwrap();
    assert_eq!(
        (info.version, info.bytes_per_second, info.bytes_burst),
        (2, 5, 6)
    );
    let plain = ServerInfo {
        version: 2,
        ..ServerInfo::default()
    };
    assert_eq!(serde_json::to_string(&plain).unwrap(), r#"{"version":2}"#);
}

#[test]
fn a_permit_travels_in_the_login() {
    let secret = PermitSecret::from_seed(&[1; 32]).unwrap();
    let info = ClientInfo {
        version: derp::VERSION,
        can_ack_pings: true,
        is_prober: false,
        weir_permit: Some(secret.permit(NetworkId(9), A, 1_000)),
    };
    let text = serde_json::to_string(&info).unwrap();
    assert!(text.contains(r#""weir_permit":{"network":9,"#), "{text}");
    assert_eq!(serde_json::from_str::<ClientInfo>(&text).unwrap(), info);
}

#[test]
fn discovery_is_told_by_its_magic_and_length() {
    let mut packet = b"TS\xf0\x9f\x92\xac".to_vec();
    packet.resize(62, 0);
    assert!(derp::is_disco(&packet));
    assert!(!derp::is_disco(&packet[..61]));
    assert!(!derp::is_disco(&[4; 62]));
}

proptest! {
    #[test]
    fn packets_round_trip(
        src: [u8; 32],
        dst: [u8; 32],
        packet in prop::collection::vec(any::<u8>(), 0..2_000),
        more: Vec<u8>,
    ) {
        let (src, dst, packet) = (NodeKey(src), NodeKey(dst), packet.as_slice());
        for frame in [
            Frame::SendPacket { dst, packet },
            Frame::RecvPacket { src, packet },
            Frame::ForwardPacket { src, dst, packet },
        ] {
            let mut wire = frame.to_vec();
            let length = wire.len();
            wire.extend(&more);
            prop_assert_eq!(Frame::split(&wire), Ok(Some((frame, length))));
        }
    }

    #[test]
    fn presence_round_trips(peer: [u8; 32], ip: [u8; 16], port: u16, flags: Option<u8>) {
        let ip = std::net::Ipv6Addr::from(ip).to_canonical();
        let (peer, addr) = (NodeKey(peer), Some(SocketAddr::new(ip, port)));
        let frame = Frame::PeerPresent { peer, addr, flags };
        let wire = frame.to_vec();
        prop_assert_eq!(Frame::split(&wire), Ok(Some((frame, wire.len()))));
    }

    #[test]
    fn what_is_read_is_written_the_same(kind: u8, body: Vec<u8>) {
        let Ok(frame) = Frame::decode(kind, &body) else { return Ok(()) };
        let wire = frame.to_vec();
        let (again, length) = Frame::split(&wire).unwrap().unwrap();
        prop_assert_eq!(length, wire.len());
        prop_assert_eq!(again, frame);
    }

    #[test]
    fn no_stream_panics(stream: Vec<u8>) {
        let mut rest = stream.as_slice();
        while let Ok(Some((_, length))) = Frame::split(rest) {
            prop_assert!(length >= HEADER_BYTES);
            rest = &rest[length..];
        }
    }
}
