//! What waits to be written to one client: four lines, in this order.
//!
//! - *control*: what the relay itself says. When it is full, the newest is not said.
//! - *news*: who came and went, for the region's other relays alone. They must miss none: when it is
//!   full, the connection ends, and the next one begins with who is here.
//! - *disco*: discovery packets. They are few and decide whether data needs the relay at all.
//! - *data*: everything else.
//!
//! Both packet lines are bounded and drop their *oldest*: who reads slowly gets what is fresh, and
//! nobody else notices. Putting in never waits. A frame is a slice of what was read from the sender,
//! so nothing is copied here.

use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Most frames of the relay's own that wait.
pub const MAX_CONTROL: usize = 64;
/// Most news that wait: twice as many as there can be clients.
pub const MAX_NEWS: usize = 131_072;
/// Most discovery packets that wait.
pub const MAX_DISCO: usize = 64;
/// Most data packets that wait: 600 kB of full-size packets, half a second at 10 Mbit/s. Readers that
/// lose the processor for a millisecond are no slow readers; with 128 packets they lost half of what
/// they were sent when a relay was busy.
pub const MAX_DATA: usize = 512;
/// Most frames that one write takes.
pub const BATCH: usize = 64;

/// The lines of one client.
#[derive(Default)]
pub struct Queue {
    /// A lock and no channel: what is oldest must be taken out by whoever puts in. It is held for
    /// some pushes and pops, never across an await.
    lines: Mutex<Lines>,
    wake: Notify,
}

#[derive(Default)]
struct Lines {
    control: VecDeque<Bytes>,
    news: VecDeque<Bytes>,
    disco: VecDeque<Bytes>,
    data: VecDeque<Bytes>,
    closed: bool,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It waits.
    Queued,
    /// It waits, and the oldest of its line was dropped for it.
    Displaced,
    /// The client is leaving.
    Closed,
}

impl Queue {
    /// Puts in a packet's frame.
    pub fn push_packet(&self, frame: Bytes, disco: bool) -> Pushed {
        let mut lines = self.lines();
        if lines.closed {
            return Pushed::Closed;
        }
        let (line, limit) = if disco {
            (&mut lines.disco, MAX_DISCO)
        } else {
            (&mut lines.data, MAX_DATA)
        };
        let displaced = line.len() >= limit && line.pop_front().is_some();
        line.push_back(frame);
        drop(lines);
        self.wake.notify_one();
        if displaced {
            Pushed::Displaced
        } else {
            Pushed::Queued
        }
    }

    /// Puts in a frame of the relay's own; lost when too many wait.
    pub fn push_control(&self, frame: Bytes) {
        let mut lines = self.lines();
        if lines.closed || lines.control.len() >= MAX_CONTROL {
            return;
        }
        lines.control.push_back(frame);
        drop(lines);
        self.wake.notify_one();
    }

    /// Puts in who came or went.
    pub fn push_news(&self, frame: Bytes) {
        let mut lines = self.lines();
        if lines.closed {
            return;
        }
        if lines.news.len() >= MAX_NEWS {
            lines.close(None);
        } else {
            lines.news.push_back(frame);
        }
        drop(lines);
        self.wake.notify_one();
    }

    /// Takes nothing more but this last word, and drops the packets that wait.
    pub fn close(&self, last: Option<Bytes>) {
        let mut lines = self.lines();
        if lines.closed {
            return;
        }
        lines.close(last);
        drop(lines);
        self.wake.notify_one();
    }

    /// Waits until there is something to write, and moves up to [`BATCH`] frames into `batch`.
    /// `false` when the queue is closed and empty. One caller at a time; nothing is lost when the
    /// wait is given up.
    pub async fn take(&self, batch: &mut VecDeque<Bytes>) -> bool {
        loop {
            {
                let mut lines = self.lines();
                lines.drain_into(batch);
                if !batch.is_empty() {
                    return true;
                }
                if lines.closed {
                    return false;
                }
            }
            self.wake.notified().await;
        }
    }

    /// Gives memory back that a burst left behind.
    pub fn shrink(&self) {
        let mut lines = self.lines();
        lines.control.shrink_to_fit();
        lines.news.shrink_to_fit();
        lines.disco.shrink_to_fit();
        lines.data.shrink_to_fit();
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        // Every change is whole before anything that could panic.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lines {
    fn close(&mut self, last: Option<Bytes>) {
        self.closed = true;
        self.control.extend(last);
        for line in [&mut self.news, &mut self.disco, &mut self.data] {
            line.clear();
        }
    }

    fn drain_into(&mut self, batch: &mut VecDeque<Bytes>) {
        let Self {
            control,
            news,
            disco,
            data,
            closed: _,
        } = self;
        for line in [control, news, disco, data] {
            let room = BATCH.saturating_sub(batch.len());
            batch.extend(line.drain(..room.min(line.len())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(number: usize) -> Bytes {
        Bytes::from(number.to_string())
    }

    async fn all(queue: &Queue) -> Vec<String> {
        let mut batch = VecDeque::new();
        assert!(queue.take(&mut batch).await);
        let text = |frame: &Bytes| String::from_utf8(frame.to_vec()).unwrap();
        batch.iter().map(text).collect()
    }

    #[tokio::test]
    async fn control_goes_before_discovery_and_discovery_before_data() {
        let queue = Queue::default();
        assert_eq!(queue.push_packet(frame(3), false), Pushed::Queued);
        assert_eq!(queue.push_packet(frame(2), true), Pushed::Queued);
        queue.push_control(frame(1));
        assert_eq!(all(&queue).await, ["1", "2", "3"]);
    }

    #[tokio::test]
    async fn of_news_all_are_told_or_none() {
        let queue = Queue::default();
        for number in 0..MAX_NEWS {
            queue.push_news(frame(number));
        }
        assert_eq!(all(&queue).await[..2], ["0", "1"]);
        for number in 0..=BATCH {
            queue.push_news(frame(number));
        }
        assert!(!queue.take(&mut VecDeque::new()).await, "it is closed");
    }

    #[tokio::test]
    async fn the_oldest_data_goes_and_discovery_is_not_touched() {
        let queue = Queue::default();
        queue.push_packet(frame(1_000), true);
        for number in 0..MAX_DATA {
            assert_eq!(queue.push_packet(frame(number), false), Pushed::Queued);
        }
        assert_eq!(queue.push_packet(frame(MAX_DATA), false), Pushed::Displaced);
        let first = all(&queue).await;
        assert_eq!(first.len(), BATCH);
        assert_eq!(first[..3], ["1000", "1", "2"]);
        let mut rest = Vec::new();
        while rest.len() + first.len() < MAX_DATA + 1 {
            rest.extend(all(&queue).await);
        }
        assert_eq!(rest.last(), Some(&MAX_DATA.to_string()));
    }

    #[tokio::test]
    async fn a_closed_queue_says_its_last_word_and_ends() {
        let queue = Queue::default();
        queue.push_packet(frame(1), false);
        queue.close(Some(frame(2)));
        queue.close(Some(frame(3)));
        assert_eq!(queue.push_packet(frame(4), true), Pushed::Closed);
        assert_eq!(all(&queue).await, ["2"]);
        assert!(!queue.take(&mut VecDeque::new()).await);
    }
}
