//! Under load: who reads slowly hurts only itself, who sends too much waits.

use crate::client::{Login, join, join_with, key};
use crate::place::Place;
use relay::admit::{Admission, burst};
use relay::config::Certificate;
use std::time::{Duration, Instant};

const FLOOD: u32 = 4_000;
const TO_THE_OTHER_EVERY: u32 = 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_loses_its_own_packets_alone() {
    let place = Place::open();
    let mut sender = join(place.addr(), 1).await;
    let mut reader = join(place.addr(), 2).await;
    let slow = Login {
        receive_buffer: Some(8 << 10),
        ..Login::default()
    };
    let mut sleeper = join_with(place.addr(), 3, slow).await.unwrap();
    let flood = tokio::spawn(async move {
        for number in 0..FLOOD {
            let mut packet = vec![0; 1_200];
            packet[..4].copy_from_slice(&number.to_be_bytes());
            sender.send_packet(key(3), &packet).await;
            if number % TO_THE_OTHER_EVERY == 0 {
                sender.send_packet(key(2), &number.to_be_bytes()).await;
            }
        }
        // After the pong, all of the above has been forwarded.
        sender.until_pong().await;
        sender
    });
    for number in (0..FLOOD).step_by(TO_THE_OTHER_EVERY as usize) {
        assert_eq!(reader.packet().await.1, number.to_be_bytes());
    }
    let sender = flood.await.unwrap();
    let mut got = 0;
    let last = loop {
        let packet = sleeper.packet().await.1;
        got += 1;
        let number = u32::from_be_bytes(*packet.first_chunk().unwrap());
        if number == FLOOD - 1 {
            break number;
        }
    };
    assert_eq!(last, FLOOD - 1, "what is fresh is kept");
    let dropped = "weir_relay_packets_dropped_total{reason=\"queue_full\"}";
    let dropped = place.metric(dropped).await;
    assert!(dropped > 0, "the flood was no flood");
    assert_eq!(u64::from(FLOOD), dropped + got);
    drop(sender);
}

/// Discovery decides whether data needs the relay at all, so it must not wait behind what a slow
/// reader was sent before, in our queue or in the kernel's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn discovery_overtakes_what_a_slow_reader_left() {
    /// Packets before it, and how many bytes of them may come first: what the kernels hold.
    const BEFORE: u32 = 3_000;
    const MOST_BEFORE: usize = 1 << 20;
    let place = Place::open();
    let mut sender = join(place.addr(), 1).await;
    let slow = Login {
        receive_buffer: Some(64 << 10),
        ..Login::default()
    };
    let mut sleeper = join_with(place.addr(), 3, slow).await.unwrap();
    for _ in 0..BEFORE {
        sender.send_packet(key(3), &[4; 1_200]).await;
    }
    let mut disco = proto::derp::DISCO_MAGIC.to_vec();
    disco.resize(proto::derp::DISCO_MIN_BYTES, 0);
    sender.send_packet(key(3), &disco).await;
    sender.until_pong().await;
    let mut before = 0;
    while sleeper.packet().await.1 != disco {
        before += 1_200;
    }
    assert!(before <= MOST_BEFORE, "{before} bytes came first");
}

#[tokio::test]
async fn a_client_sends_no_faster_than_its_rate() {
    let rate = 2_000_000;
    let place = Place::start(Admission::Open, Certificate::Off, rate);
    let (mut a, mut b) = (join(place.addr(), 1).await, join(place.addr(), 2).await);
    assert_eq!(a.info.bytes_per_second, rate);
    assert_eq!(a.info.bytes_burst, burst(rate));
    let packets = 1_000_u64;
    let start = Instant::now();
    let sending = tokio::spawn(async move {
        for number in 0..packets {
            let mut packet = [0; 1_200];
            packet[..8].copy_from_slice(&number.to_be_bytes());
            a.send_packet(key(2), &packet).await;
        }
        a
    });
    let last = (packets - 1).to_be_bytes();
    while b.packet().await.1[..8] != last {}
    let least = (packets * 1_200 - burst(rate)) as f64 / rate as f64;
    let took = start.elapsed();
    assert!(took >= Duration::from_secs_f64(least * 0.9), "{took:?}");
    assert!(place.metric("weir_relay_paced_total").await > 0);
    drop(sending.await.unwrap());
}
