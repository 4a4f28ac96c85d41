//! What is counted, and the page that tells it: Prometheus' text form. Counts only; never a key, an
//! address or a byte of a packet.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a packet was not delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// The destination is not connected, or is of another network.
    NotHere,
    /// The destination reads too slowly: its oldest data went.
    DataQueue,
    /// The destination reads too slowly: its oldest discovery packet went.
    DiscoQueue,
    /// The destination is leaving.
    Leaving,
}

const DROPS: [(DropReason, &str); 4] = [
    (DropReason::NotHere, "not_here"),
    (DropReason::DataQueue, "queue_full"),
    (DropReason::DiscoQueue, "discovery_queue_full"),
    (DropReason::Leaving, "leaving"),
];

/// The counters of one relay.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Connections that are open, logged in or not.
    pub connections: AtomicU64,
    /// Clients that call this relay their home.
    pub home: AtomicU64,
    /// Other relays of the region that we are connected to.
    pub links: AtomicU64,
    /// Packets handed to them, of those in `packets`.
    pub handed_on: AtomicU64,
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Logins that succeeded.
    pub logins: AtomicU64,
    /// Logins refused for their permit, or the lack of one.
    pub refused: AtomicU64,
    /// Logins that were no logins.
    pub broken: AtomicU64,
    /// Logins with a key that was here already.
    pub duplicates: AtomicU64,
    /// Packets put into their destination's queue.
    pub packets: AtomicU64,
    /// Their bytes, frames included.
    pub bytes: AtomicU64,
    /// Times that a client was made to wait for its rate.
    pub paced: AtomicU64,
    /// When the certificate that an authority gave ends, in seconds since 1970; 0 without one.
    pub certificate_until: AtomicU64,
    /// Certificates that an authority gave.
    pub certificates: AtomicU64,
    /// Times that it gave none.
    pub certificate_failures: AtomicU64,
    /// STUN requests answered.
    pub stun: AtomicU64,
    /// Datagrams on the STUN port that were none.
    pub stun_ignored: AtomicU64,
    drops: [AtomicU64; DROPS.len()],
}

impl Metrics {
    /// Adds to a counter.
    pub fn add(counter: &AtomicU64, amount: u64) {
        counter.fetch_add(amount, Ordering::Relaxed);
    }

    /// Takes from a gauge.
    pub fn take(gauge: &AtomicU64, amount: u64) {
        gauge.fetch_sub(amount, Ordering::Relaxed);
    }

    /// Counts a packet that was not delivered.
    pub fn dropped(&self, reason: DropReason) {
        for (counter, (other, _)) in self.drops.iter().zip(DROPS) {
            if other == reason {
                Self::add(counter, 1);
            }
        }
    }

    /// The page; `clients` is the number of keys connected.
    #[must_use]
    pub fn page(&self, clients: usize) -> String {
        let mut page = String::new();
        for (name, help, value) in self.gauges(clients) {
            sample(&mut page, name, "gauge", help, value);
        }
        for (name, help, value) in self.counters() {
            sample(&mut page, name, "counter", help, get(value));
        }
        let name = "weir_relay_packets_dropped_total";
        let _ = writeln!(page, "# HELP {name} Packets not delivered, by reason.");
        let _ = writeln!(page, "# TYPE {name} counter");
        for (counter, (_, reason)) in self.drops.iter().zip(DROPS) {
            let _ = writeln!(page, "{name}{{reason=\"{reason}\"}} {}", get(counter));
        }
        page
    }

    fn gauges(&self, clients: usize) -> [(&str, &str, u64); 5] {
        [
            ("clients", "Node keys that are connected", clients as u64),
            ("connections", "Open connections", get(&self.connections)),
            (
                "home_clients",
                "Clients that call this relay their home",
                get(&self.home),
            ),
            (
                "region_links",
                "Other relays of the region that are connected",
                get(&self.links),
            ),
            (
                "certificate_until_seconds",
                "End of the certificate that an authority gave by ACME, in Unix time; 0 without one",
                get(&self.certificate_until),
            ),
        ]
    }

    fn counters(&self) -> [(&str, &str, &AtomicU64); 13] {
        [
            ("accepted_total", "Connections accepted", &self.accepted),
            ("logins_total", "Logins that succeeded", &self.logins),
            (
                "logins_refused_total",
                "Logins that no permit allowed",
                &self.refused,
            ),
            ("logins_broken_total", "Logins that were none", &self.broken),
            (
                "duplicate_keys_total",
                "Logins with a key that was here",
                &self.duplicates,
            ),
            (
                "packets_total",
                "Packets queued for their destination",
                &self.packets,
            ),
            (
                "handed_on_total",
                "Those of them that went to another relay of the region",
                &self.handed_on,
            ),
            ("bytes_total", "Bytes of those packets' frames", &self.bytes),
            (
                "paced_total",
                "Times that a client waited for its rate",
                &self.paced,
            ),
            (
                "certificates_total",
                "Certificates that an authority gave by ACME",
                &self.certificates,
            ),
            (
                "certificate_failures_total",
                "Times that the authority was asked for one and gave none",
                &self.certificate_failures,
            ),
            ("stun_answers_total", "STUN requests answered", &self.stun),
            (
                "stun_ignored_total",
                "Datagrams that were no STUN request",
                &self.stun_ignored,
            ),
        ]
    }
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn sample(page: &mut String, name: &str, kind: &str, help: &str, value: u64) {
    // Writing to a string cannot fail.
    let _ = writeln!(page, "# HELP weir_relay_{name} {help}.");
    let _ = writeln!(page, "# TYPE weir_relay_{name} {kind}");
    let _ = writeln!(page, "weir_relay_{name} {value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_is_counted_apart() {
        let metrics = Metrics::default();
        for (count, (reason, _)) in DROPS.into_iter().enumerate() {
            for _ in 0..=count {
                metrics.dropped(reason);
            }
        }
        let page = metrics.page(3);
        for (count, (_, reason)) in DROPS.into_iter().enumerate() {
            let line = format!(
                "weir_relay_packets_dropped_total{{reason=\"{reason}\"}} {}\n",
                count + 1
            );
            assert!(page.contains(&line), "{page}");
        }
        assert!(page.contains("\nweir_relay_clients 3\n"), "{page}");
    }
}
