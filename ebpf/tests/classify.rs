//! What a datagram on WireGuard's port is: [`classify`] against one that is as slow as it is plain.
#![allow(clippy::unwrap_used, reason = "a test may fail by it")]

use ebpf::classify::{Class, HEAD_BYTES, classify};

/// By the whole datagram, rule by rule.
fn plain(datagram: &[u8]) -> Class {
    let len = datagram.len();
    let wireguard = |kind: u8| datagram.starts_with(&[kind, 0, 0, 0]);
    if wireguard(1) && len == 148 {
        return Class::Initiation;
    }
    if wireguard(2) && len == 92 {
        return Class::Response;
    }
    if wireguard(3) && len == 64 {
        return Class::Cookie;
    }
    if wireguard(4) && len >= 32 {
        return Class::Data;
    }
    if datagram.starts_with("TS💬".as_bytes()) && len >= 62 {
        return Class::Disco;
    }
    if len >= 20 && datagram[0] < 64 && datagram[4..8] == [0x21, 0x12, 0xa4, 0x42] {
        let claimed = usize::from(datagram[2]) * 256 + usize::from(datagram[3]);
        if claimed % 4 == 0 && 20 + claimed <= len {
            return Class::Stun;
        }
    }
    Class::Other
}

fn classified(datagram: &[u8]) -> Class {
    let mut head = [0_u8; HEAD_BYTES as usize];
    for (to, from) in head.iter_mut().zip(datagram) {
        *to = *from;
    }
    let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
    classify(u32::try_from(datagram.len()).unwrap(), [word(0), word(4)])
}

/// First bytes that mean something, and a few that mean nothing.
fn beginnings() -> Vec<[u8; 8]> {
    let cookie = [0x21, 0x12, 0xa4, 0x42];
    let mut all = vec![*b"TS\xf0\x9f\x92\xackk", [0; 8], [0xff; 8], *b"GET / HT"];
    for kind in 0..=5 {
        all.push([kind, 0, 0, 0, 9, 9, 9, 9]);
        // A receiver that looks like STUN.
        all.push([kind, 0, 0, 0, cookie[0], cookie[1], cookie[2], cookie[3]]);
    }
    for length in [0_u16, 4, 8, 12, 128, 0xfffc] {
        let [high, low] = length.to_be_bytes();
        all.push([0, 1, high, low, cookie[0], cookie[1], cookie[2], cookie[3]]);
    }
    all
}

#[test]
fn every_length_of_every_beginning_is_what_the_rules_say() {
    let mut seen = std::collections::BTreeSet::new();
    for beginning in beginnings() {
        for len in 0..=1_500_usize {
            let mut datagram = beginning.to_vec();
            datagram.resize(len, 0x5a);
            let class = classified(&datagram);
            assert_eq!(class, plain(&datagram), "{beginning:x?}, {len} bytes");
            seen.insert(class);
        }
    }
    assert_eq!(seen.len(), 7, "each class is among them: {seen:?}");
}

#[test]
fn any_single_wrong_bit_is_judged_by_the_rules_too() {
    for beginning in beginnings() {
        for bit in 0..64 {
            let mut wrong = beginning;
            wrong[bit / 8] ^= 1 << (bit % 8);
            for len in [
                7, 8, 19, 20, 24, 31, 32, 61, 62, 64, 92, 147, 148, 160, 1_456,
            ] {
                let mut datagram = wrong.to_vec();
                datagram.resize(len, 0);
                assert_eq!(classified(&datagram), plain(&datagram), "{wrong:x?}, {len}");
            }
        }
    }
}

#[test]
fn what_is_too_short_to_tell_is_nothing_whatever_the_head_says() {
    let initiation = [u32::from_le(1), 0];
    for bytes in 0..HEAD_BYTES {
        assert_eq!(classify(bytes, initiation), Class::Other);
    }
    assert_eq!(classify(148, initiation), Class::Initiation);
    assert_eq!(classify(u32::MAX, initiation), Class::Other);
}
