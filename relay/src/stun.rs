//! The STUN responder: tells whoever asks which address it comes from. It remembers nothing.

use crate::metrics::Metrics;
use proto::stun::{self, MAX_BYTES};
use std::sync::Arc;
use tokio::net::UdpSocket;

/// Answers until it is dropped.
pub async fn serve(socket: UdpSocket, metrics: Arc<Metrics>) {
    // One byte more than the longest, so that a longer one is seen to be longer.
    let mut datagram = vec![0; MAX_BYTES + 1];
    loop {
        // What fails is an answer to somebody who is gone already: not our business.
        let Ok((length, from)) = socket.recv_from(&mut datagram).await else {
            tokio::task::yield_now().await;
            continue;
        };
        let question = datagram.get(..length).unwrap_or_default();
        let Ok(transaction) = stun::parse_request(question) else {
            Metrics::add(&metrics.stun_ignored, 1);
            continue;
        };
        let answer = stun::response(transaction, from);
        if socket.send_to(&answer, from).await.is_ok() {
            Metrics::add(&metrics.stun, 1);
        }
    }
}
