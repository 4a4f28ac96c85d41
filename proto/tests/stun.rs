//! STUN against RFC 5769's sample messages, against itself, and against garbage.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use data_encoding::HEXLOWER_PERMISSIVE;
use proptest::prelude::*;
use proto::stun::{self, StunError};
use std::net::SocketAddr;

/// RFC 5769 2.2: answer to 192.0.2.1, with a password's checksum, which is not ours to check.
const ANSWER_V4: &str = "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220\
    002000080001a147e112a643000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96";
/// RFC 5769 2.3: the same to an IPv6 address.
const ANSWER_V6: &str = "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220\
    002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d900080014a382954e4be67bf11784c97c8292c275bfe3\
    ed4180280004c8fb0b4c";

fn bytes(hex: &str) -> Vec<u8> {
    HEXLOWER_PERMISSIVE.decode(hex.as_bytes()).unwrap()
}

#[test]
fn the_sample_answers_of_rfc_5769_are_read() {
    let transaction = *bytes("b7e7a701bc34d686fa87dfae").first_chunk().unwrap();
    for (answer, addr) in [
        (ANSWER_V4, "192.0.2.1:32853"),
        (ANSWER_V6, "[2001:db8:1234:5678:11:2233:4455:6677]:32853"),
    ] {
        let addr: SocketAddr = addr.parse().unwrap();
        assert_eq!(
            stun::parse_response(&bytes(answer)),
            Ok((transaction, addr))
        );
    }
}

#[test]
fn an_altered_message_is_refused() {
    let mut answer = bytes(ANSWER_V4);
    answer[60] ^= 1;
    assert_eq!(stun::parse_response(&answer), Err(StunError::Fingerprint));
    let mut request = stun::request([1; 12]);
    assert_eq!(stun::parse_response(&request), Err(StunError::Kind));
    request.push(0);
    assert_eq!(stun::parse_request(&request), Err(StunError::NotStun));
}

#[test]
fn an_old_servers_plain_address_is_taken() {
    let answer = bytes("0101000c2112a4420000000000000000000000000001000800010035c0000201");
    let addr = "192.0.2.1:53".parse().unwrap();
    assert_eq!(stun::parse_response(&answer), Ok(([0; 12], addr)));
}

#[test]
fn what_must_be_understood_and_is_not_is_not_answered() {
    // USERNAME of four bytes.
    let demanding = bytes("000100082112a4420000000000000000000000000006000461626364");
    assert_eq!(stun::parse_request(&demanding), Err(StunError::Unknown));
    // The same as an attribute that may be ignored, and none at all.
    let polite = bytes("000100082112a4420000000000000000000000008006000461626364");
    assert_eq!(stun::parse_request(&polite), Ok([0; 12]));
    let bare = bytes("000100002112a442000000000000000000000000");
    assert_eq!(stun::parse_request(&bare), Ok([0; 12]));
}

#[test]
fn an_answer_is_little_longer_than_a_question() {
    let addr = "[2001:db8::1]:1".parse().unwrap();
    assert_eq!(stun::response([0; 12], addr).len(), 44);
    assert_eq!(stun::request([0; 12]).len(), 40);
}

#[test]
fn wireguard_and_disco_are_not_taken_for_stun() {
    let mut handshake = [0; 148];
    handshake[0] = 1;
    assert!(!stun::is_stun(&handshake));
    assert!(!stun::is_stun("TS💬 and then keys and a box".as_bytes()));
    assert!(stun::is_stun(&stun::request([0; 12])));
}

proptest! {
    #[test]
    fn questions_and_answers_round_trip(
        transaction: [u8; 12], port: u16, v4: [u8; 4], v6: [u8; 16],
    ) {
        prop_assert_eq!(stun::parse_request(&stun::request(transaction)), Ok(transaction));
        for addr in [SocketAddr::from((v4, port)), SocketAddr::from((v6, port))] {
            let seen = SocketAddr::new(addr.ip().to_canonical(), port);
            let answer = stun::response(transaction, addr);
            prop_assert_eq!(stun::parse_response(&answer), Ok((transaction, seen)));
        }
    }

    #[test]
    fn no_datagram_panics(mut datagram: Vec<u8>, flips in prop::collection::vec(any::<(u8, u8)>(), 8)) {
        let _ = (stun::parse_request(&datagram), stun::parse_response(&datagram));
        for sample in [bytes(ANSWER_V6), stun::request([3; 12])] {
            datagram = sample;
            for (place, value) in &flips {
                let place = usize::from(*place) % datagram.len();
                datagram[place] = *value;
            }
            let _ = (stun::parse_request(&datagram), stun::parse_response(&datagram));
        }
    }
}
