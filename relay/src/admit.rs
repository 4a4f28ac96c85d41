//! Who may use the relay, for which network and until when; and how fast.
//!
//! A client shows a [`Permit`](proto::permit::Permit) that a coordinator of its network signed. The
//! relay holds the networks' public keys and asks nobody: what it does not know it refuses.

use proto::derp::{ClientInfo, VERSION};
use proto::id::NetworkId;
use proto::key::{NodeKey, PermitKey};
use proto::permit::PermitError;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A client may send so many seconds of its rate at once.
const BURST: Duration = Duration::from_millis(100);
/// And never fewer bytes than some packets of full size.
const MIN_BURST: u64 = 256 << 10;

/// Who is let in.
#[derive(Clone, Debug)]
pub enum Admission {
    /// Whoever proves a key, all in one tenant. For tests of other implementations.
    Open,
    /// Whoever has a permit that one of its network's keys signed.
    Permit(BTreeMap<NetworkId, Vec<PermitKey>>),
}

/// A client that is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// Its network; `None` on an open relay.
    pub network: Option<NetworkId>,
    /// Seconds since 1970 at which it must show a new permit.
    pub until: Option<u64>,
}

/// Why a client is not let in. The text is for it to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It speaks an older version.
    #[error("this relay speaks version {VERSION} of DERP; update the client")]
    Version,
    /// It shows no permit.
    #[error("this relay admits only nodes with a permit of their coordinator")]
    NoPermit,
    /// The relay has no keys of that network.
    #[error("this relay does not serve the permit's network")]
    Network,
    /// See [`PermitError`].
    #[error(transparent)]
    Permit(#[from] PermitError),
}

impl Admission {
    /// Lets in the node of the proven key `node` at `now` (seconds since 1970), or not.
    ///
    /// # Errors
    /// Why not.
    pub fn admit(&self, node: NodeKey, info: &ClientInfo, now: u64) -> Result<Admitted, Refusal> {
        if info.version < VERSION {
            return Err(Refusal::Version);
        }
        let networks = match self {
            Self::Open => {
                return Ok(Admitted {
                    network: None,
                    until: None,
                });
            }
            Self::Permit(networks) => networks,
        };
        let permit = info.weir_permit.ok_or(Refusal::NoPermit)?;
        let keys = networks.get(&permit.network).ok_or(Refusal::Network)?;
        permit.check(node, now, keys)?;
        Ok(Admitted {
            network: Some(permit.network),
            until: Some(permit.expires),
        })
    }
}

/// A client's rate: a bucket that fills with time and is emptied by bytes. It may go below empty by
/// one frame, and the client then waits.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    rate: u64,
    level: f64,
    at: Instant,
}

impl Pace {
    /// Full, at `now`; `rate` in bytes a second, 0 for none.
    #[must_use]
    pub fn new(rate: u64, now: Instant) -> Self {
        let level = burst(rate) as f64;
        Self {
            rate,
            level,
            at: now,
        }
    }

    /// Takes `bytes` out and says how long to wait before the next frame is read.
    pub fn take(&mut self, bytes: usize, now: Instant) -> Option<Duration> {
        if self.rate == 0 {
            return None;
        }
        let (rate, full) = (self.rate as f64, burst(self.rate) as f64);
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.level = (self.level + passed * rate).min(full) - bytes as f64;
        (self.level < 0.0).then(|| Duration::from_secs_f64(-self.level / rate))
    }
}

/// How many bytes a client of this rate may send at once; 0 for no rate.
#[must_use]
pub fn burst(rate: u64) -> u64 {
    let millis = u64::try_from(BURST.as_millis()).unwrap_or(u64::MAX);
    match rate {
        0 => 0,
        rate => (rate.saturating_mul(millis) / 1_000).max(MIN_BURST),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::permit::PermitSecret;

    const NODE: NodeKey = NodeKey([7; 32]);

    fn secret(seed: u8) -> PermitSecret {
        PermitSecret::from_seed(&[seed; 32]).unwrap()
    }

    fn admission() -> Admission {
        Admission::Permit(BTreeMap::from([
            (NetworkId(1), vec![secret(1).public()]),
            (NetworkId(2), vec![secret(2).public(), secret(3).public()]),
        ]))
    }

    fn admit(signer: u8, network: u64, node: NodeKey, expires: u64) -> Result<Admitted, Refusal> {
        let weir_permit = Some(secret(signer).permit(NetworkId(network), node, expires));
        let info = ClientInfo {
            version: VERSION,
            weir_permit,
            ..ClientInfo::default()
        };
        admission().admit(NODE, &info, 1_000)
    }

    #[test]
    fn a_permit_of_its_own_network_alone_admits() {
        let admitted = |network, until| {
            Ok(Admitted {
                network: Some(NetworkId(network)),
                until: Some(until),
            })
        };
        assert_eq!(admit(1, 1, NODE, 2_000), admitted(1, 2_000));
        // A network may change its key: both are taken for a while.
        assert_eq!(admit(2, 2, NODE, 2_000), admitted(2, 2_000));
        assert_eq!(admit(3, 2, NODE, 2_000), admitted(2, 2_000));
        assert_eq!(admit(1, 1, NODE, 1_000), Err(PermitError::Expired.into()));
        let other = NodeKey([8; 32]);
        assert_eq!(admit(1, 1, other, 2_000), Err(PermitError::Node.into()));
        assert_eq!(admit(1, 2, NODE, 2_000), Err(PermitError::Signature.into()));
        assert_eq!(admit(1, 3, NODE, 2_000), Err(Refusal::Network));
    }

    #[test]
    fn without_a_permit_only_an_open_relay_admits() {
        let mut info = ClientInfo {
            version: VERSION,
            ..ClientInfo::default()
        };
        let refused = admission().admit(NODE, &info, 0);
        assert_eq!(refused, Err(Refusal::NoPermit));
        let nothing = Admission::Permit(BTreeMap::new());
        assert_eq!(nothing.admit(NODE, &info, 0), Err(Refusal::NoPermit));
        assert!(Admission::Open.admit(NODE, &info, 0).is_ok());
        info.version = 1;
        let refused = Admission::Open.admit(NODE, &info, 0);
        assert_eq!(refused, Err(Refusal::Version));
    }

    #[test]
    fn a_client_gets_its_rate_and_no_more() {
        let start = Instant::now();
        let rate = 10 << 20;
        let mut pace = Pace::new(rate, start);
        let mut now = start;
        let mut sent = 0;
        while now < start + Duration::from_secs(10) {
            sent += 1_200;
            match pace.take(1_200, now) {
                Some(wait) => now += wait,
                None => now += Duration::from_micros(10),
            }
        }
        let most = rate * 10 + burst(rate) + 1_200;
        assert!((rate * 10..=most).contains(&sent), "{sent}");
        assert_eq!(Pace::new(0, start).take(usize::MAX, start), None);
    }
}
