//! Bytes from strangers: the corpus, and what becomes of it when it is cut, joined and changed.
//!
//! ```text
//! corpus/*.hex ─► change (seeded) ─► decode ─┬─► an error: fine
//!                                            └─► a value: written and read again, it is the same
//! ```
//!
//! Every case is made of its number alone, so a failure names the bytes, which then become a line of
//! the corpus. `WEIR_FULL` makes it fifty times as many.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use data_encoding::HEXLOWER;
use proto::derp::{ClientInfo, Frame, HEADER_BYTES, Header, ServerInfo};
use proto::disco::{self, DiscoBox, Message};
use proto::key::DiscoSecret;
use proto::permit::Permit;
use proto::stun;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// One case a line, in hexadecimal digits; what begins with `#` is for people.
const DERP: &str = include_str!("corpus/derp.hex");
const DISCO: &str = include_str!("corpus/disco.hex");
const STUN: &str = include_str!("corpus/stun.hex");
const LOGIN: &str = include_str!("corpus/login.hex");

const CASES: u64 = 40_000;
const CASES_FULL: u64 = 2_000_000;
/// Numbers at which lengths and ports go wrong.
const EDGES: [u8; 8] = [0, 1, 2, 0x20, 0x7f, 0x80, 0xfe, 0xff];

/// Numbers from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    fn byte(&mut self) -> u8 {
        self.next() as u8
    }
}

fn corpus(text: &str) -> Vec<Vec<u8>> {
    let lines = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| HEXLOWER.decode(line.as_bytes()).unwrap())
        .collect()
}

/// One case: two of the corpus, changed in some places.
fn case(corpus: &[Vec<u8>], number: u64) -> Vec<u8> {
    let random = &mut Random(number);
    let mut bytes = corpus[random.below(corpus.len())].clone();
    for _ in 0..random.below(5) {
        let place = random.below(bytes.len() + 1);
        match random.below(8) {
            0 => bytes.truncate(place),
            1 => bytes.insert(place, random.byte()),
            2 => {
                let other = &corpus[random.below(corpus.len())];
                bytes.truncate(place);
                bytes.extend(&other[random.below(other.len() + 1)..]);
            }
            3 => bytes.extend(corpus[random.below(corpus.len())].iter()),
            4 if place < bytes.len() => {
                bytes.drain(place..(place + 1 + random.below(40)).min(bytes.len()));
            }
            5 if place < bytes.len() => bytes[place] = EDGES[random.below(EDGES.len())],
            _ if place < bytes.len() => bytes[place] ^= 1 << random.below(8),
            _ => bytes.push(random.byte()),
        }
    }
    bytes
}

/// Shows each case to `check`.
fn fuzz(text: &str, check: impl Fn(&[u8])) {
    let corpus = corpus(text);
    assert!(!corpus.is_empty());
    let full = std::env::var_os("WEIR_FULL").is_some();
    let cases = if full { CASES_FULL } else { CASES };
    let changed = (0..cases).map(|number| case(&corpus, number));
    for bytes in corpus.iter().cloned().chain(changed) {
        let checked = catch_unwind(AssertUnwindSafe(|| check(&bytes)));
        assert!(
            checked.is_ok(),
            "for the corpus: {}",
            HEXLOWER.encode(&bytes)
        );
    }
}

/// The frames of a stream, each as its bytes, and whether it ended in an error.
fn frames(stream: &[u8]) -> (Vec<&[u8]>, bool) {
    let (mut rest, mut found) = (stream, Vec::new());
    loop {
        match Frame::split(rest) {
            Ok(Some((frame, length))) => {
                let (bytes, more) = rest.split_at(length);
                let again = frame.to_vec();
                let read = Frame::split(&again).unwrap().unwrap();
                assert_eq!(read, (frame, again.len()));
                found.push(bytes);
                rest = more;
            }
            Ok(None) => return (found, false),
            Err(_) => return (found, true),
        }
    }
}

#[test]
fn any_stream_is_cut_into_the_same_frames_however_it_comes() {
    fuzz(DERP, |stream| {
        let (whole, broken) = frames(stream);
        let lengths: usize = whole.iter().map(|frame| frame.len()).sum();
        assert!(lengths <= stream.len());
        // A prefix shows a prefix, and an error stays an error whatever follows.
        let (part, broken_early) = frames(&stream[..stream.len() / 2]);
        assert!(whole.starts_with(&part));
        assert!(!broken_early || (broken && part == whole));
        if let Some(header) = stream.first_chunk::<HEADER_BYTES>()
            && let Ok(header) = Header::decode(*header)
        {
            assert_eq!(Header::decode(header.encode()), Ok(header));
        }
    });
}

#[test]
fn any_packet_is_one_message_or_none_and_only_sealed_ones_open() {
    let (ours, theirs) = (
        DiscoSecret::from_bytes([2; 32]),
        DiscoSecret::from_bytes([1; 32]),
    );
    let door = DiscoBox::new(&ours, theirs.public()).unwrap();
    let sealed: Vec<Vec<u8>> = corpus(DISCO);
    let opens = sealed.iter().filter(|packet| door.open(packet).is_ok());
    assert!(opens.count() > 0, "nothing in the corpus opens");
    fuzz(DISCO, |packet| {
        if let Some(message) = Message::decode(packet) {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
        let opened = door.open(packet);
        assert!(opened.is_err() || sealed.iter().any(|known| known == packet));
        assert!(opened.is_err() || disco::is_disco(packet));
        if disco::is_disco(packet) {
            assert!(disco::sender(packet).is_some());
        }
    });
}

#[test]
fn any_datagram_is_a_question_an_answer_or_neither() {
    fuzz(STUN, |datagram| {
        let question = stun::parse_request(datagram);
        let answer = stun::parse_response(datagram);
        assert!(question.is_err() || answer.is_err());
        if let Ok(transaction) = question {
            assert!(stun::is_stun(datagram));
            let again = stun::request(transaction);
            assert_eq!(stun::parse_request(&again), Ok(transaction));
        }
        if let Ok((transaction, seen)) = answer {
            let again = stun::response(transaction, seen);
            assert_eq!(stun::parse_response(&again), Ok((transaction, seen)));
        }
    });
}

#[test]
fn any_login_is_read_as_it_is_written() {
    fn same<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
        if let Ok(value) = serde_json::from_slice::<T>(bytes) {
            let text = serde_json::to_vec(&value).unwrap();
            assert_eq!(serde_json::from_slice::<T>(&text).unwrap(), value);
        }
    }
    fuzz(LOGIN, |text| {
        same::<ClientInfo>(text);
        same::<ServerInfo>(text);
        same::<Permit>(text);
    });
}
