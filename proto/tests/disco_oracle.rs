//! Our discovery packets against another implementation of them, published by others: each reads
//! what the other wrote, down to the last byte.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;
use proto::disco::{DiscoBox, MAX_PADDING, Message, TxId};
use proto::key::{DiscoKey, DiscoSecret, NodeKey};
use proto::netmap::MAX_ENDPOINTS_PER_NODE;
use std::net::{Ipv6Addr, SocketAddr};
use ts_disco_protocol as other;
use ts_keys::{DiscoPrivateKey, Export, NodePublicKey};

/// The other implementation's key of these bytes.
fn theirs(bytes: [u8; 32]) -> DiscoPrivateKey {
    Export::from_bytes(bytes).import()
}

/// The packet that the other implementation makes of a message.
fn sealed_by_them(
    message: &Message,
    from: [u8; 32],
    to: DiscoKey,
    nonce: [u8; 24],
) -> Option<Vec<u8>> {
    let (from, to) = (theirs(from), ts_keys::DiscoPublicKey::from_bytes(to.0));
    let size = message.encode().len() - 2;
    let mut bytes = vec![0; other::Packet::size_for_message(size)];
    let made = match message {
        Message::Ping {
            tx,
            node: Some(node),
            ..
        } => other::Packet::init_from_bytes(&mut bytes, |ping: &mut other::Ping| {
            ping.tx_id = tx.0;
            ping.node_key = NodePublicKey::from_bytes(node.0);
        }),
        Message::Pong { tx, seen, .. } => {
            other::Packet::init_from_bytes(&mut bytes, |pong: &mut other::Pong| {
                *pong = other::Pong {
                    tx_id: tx.0,
                    src: (*seen).into(),
                };
            })
        }
        Message::CallMeMaybe { endpoints } => {
            other::Packet::init_from_bytes(&mut bytes, |call: &mut other::CallMeMaybe| {
                for (place, endpoint) in call.endpoints.iter_mut().zip(endpoints) {
                    *place = (*endpoint).into();
                }
            })
        }
        // It has no word for these.
        Message::Ping { node: None, .. } | Message::Unknown(_) => return None,
    };
    made.unwrap().encrypt_in_place(&from, &to, nonce).unwrap();
    Some(bytes)
}

/// What the other implementation reads in a packet of ours.
fn opened_by_them(mut packet: Vec<u8>, with: [u8; 32]) -> Message {
    let packet = other::Packet::from_encrypted_bytes_mut(&mut packet).unwrap();
    let plain = packet.decrypt_in_place(&theirs(with)).unwrap();
    match plain.ty().unwrap() {
        other::MessageType::Ping => {
            let ping = plain.as_msg::<other::Ping>().unwrap();
            Message::Ping {
                tx: TxId(ping.tx_id),
                node: Some(NodeKey(ping.node_key.to_crypto_box().to_bytes())),
                padding: u16::try_from(ping.padding.len()).unwrap(),
            }
        }
        other::MessageType::Pong => {
            let pong = plain.as_msg::<other::Pong>().unwrap();
            Message::Pong {
                tx: TxId(pong.tx_id),
                seen: pong.src.socket_addr(),
                took: None,
            }
        }
        other::MessageType::CallMeMaybe => {
            let call = plain.as_msg::<other::CallMeMaybe>().unwrap();
            let endpoints = call
                .endpoints
                .iter()
                .map(other::Endpoint::socket_addr)
                .collect();
            Message::CallMeMaybe { endpoints }
        }
        unknown => panic!("{unknown:?}"),
    }
}

fn any_message() -> impl Strategy<Value = Message> {
    let endpoint = (any::<[u8; 16]>(), any::<u16>())
        .prop_map(|(ip, port)| SocketAddr::new(Ipv6Addr::from(ip).to_canonical(), port));
    let v4 = (any::<[u8; 4]>(), any::<u16>()).prop_map(SocketAddr::from);
    let endpoint = prop_oneof![endpoint, v4];
    let tx = any::<[u8; 12]>().prop_map(TxId);
    let node = any::<[u8; 32]>().prop_map(|key| Some(NodeKey(key)));
    prop_oneof![
        (tx, node, 0..=MAX_PADDING).prop_map(|(tx, node, padding)| Message::Ping {
            tx,
            node,
            padding
        }),
        (any::<[u8; 12]>(), endpoint.clone()).prop_map(|(tx, seen)| Message::Pong {
            tx: TxId(tx),
            seen,
            took: None
        }),
        prop::collection::vec(endpoint, 0..=MAX_ENDPOINTS_PER_NODE)
            .prop_map(|endpoints| Message::CallMeMaybe { endpoints }),
    ]
}

proptest! {
    #[test]
    fn each_reads_what_the_other_wrote(
        message in any_message(), a: [u8; 32], b: [u8; 32], nonce: [u8; 24],
    ) {
        let (ours, peer) = (DiscoSecret::from_bytes(a), DiscoSecret::from_bytes(b));
        let out = DiscoBox::new(&ours, peer.public()).unwrap();
        let packet = out.seal(nonce, &message);
        prop_assert_eq!(opened_by_them(packet.clone(), b), message.clone());
        let made = sealed_by_them(&message, a, peer.public(), nonce).unwrap();
        prop_assert_eq!(&made, &packet);
        let back = DiscoBox::new(&peer, ours.public()).unwrap();
        prop_assert_eq!(back.open(&made), Ok(message));
    }
}
