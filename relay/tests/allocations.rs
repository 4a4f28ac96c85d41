//! What one packet costs the allocator.
//!
//! Sessions on streams in memory, all on one thread, so that what is counted is theirs: a buffer is
//! read into, its packets are handed on in it, and when they have left it is read into again.

use crate::client::{Client, Login, key};
use bytes::BytesMut;
use proto::derp::Frame;
use proto::key::NodeSecret;
use relay::admit::Admission;
use relay::metrics::Metrics;
use relay::session::{Session, Shared};
use relay::switch::Switch;
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// Packets under way at once, and how often so many are sent.
const WINDOW: usize = 32;
const TURNS: usize = 500;
/// Bytes of a packet: a full one of WireGuard's, and a small one.
const SIZES: [usize; 2] = [1_200, 64];
/// Next to none: a buffer that is still in use when the next read comes is replaced.
const MOST_PER_PACKET: f64 = 0.01;

async fn session(shared: &Arc<Shared>, seed: u8) -> Client<DuplexStream> {
    let (near, far) = tokio::io::duplex(64 << 10);
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let greeting = "HTTP/1.1 101 \r\n\r\n".to_owned();
        let buffer = BytesMut::new();
        let mut far = far;
        // The request is the server's to read.
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(far.read_u8().await.unwrap());
        }
        let session = Session::login(far, greeting, buffer, shared).await;
        session.unwrap().run().await
    });
    Client::login(near, seed, Login::default()).await.unwrap()
}

#[test]
fn packets_are_carried_without_an_allocation_for_each() {
    let counted = allocation_counter::measure(|| drop(vec![0_u8; 100]));
    assert_eq!(counted.count_total, 1, "the counter counts");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let metrics = Arc::new(Metrics::default());
    let shared = Arc::new(Shared {
        switch: Switch::new(Arc::clone(&metrics)),
        admission: Admission::Open,
        relays: BTreeSet::new(),
        secret: NodeSecret::from_bytes([9; 32]),
        rate: 0,
        metrics,
    });
    let (sender, receiver) =
        runtime.block_on(async { (session(&shared, 1).await, session(&shared, 2).await) });
    let (mut sender, mut receiver) = (sender.into_stream(), receiver.into_stream());
    for size in SIZES {
        let (dst, packet) = (key(2), &vec![7; size]);
        let frame = Frame::SendPacket { dst, packet }.to_vec();
        let (sent, mut got) = (frame.repeat(WINDOW), vec![0; frame.len() * WINDOW]);
        let mut turns = |count: usize| {
            runtime.block_on(async {
                for _ in 0..count {
                    sender.write_all(&sent).await.unwrap();
                    receiver.read_exact(&mut got).await.unwrap();
                }
            });
        };
        // Queues and buffers find their size.
        turns(10);
        let counted = allocation_counter::measure(|| turns(TURNS));
        let each = counted.count_total as f64 / (TURNS * WINDOW) as f64;
        println!("{size} bytes: {each:.3} allocations a packet");
        assert!(each <= MOST_PER_PACKET, "{size} bytes: {each}");
    }
}
