//! Traces: what an engine was told and when, and a sum of what it answered. Enough to let another
//! one decide the same again, at a desk, and to notice where it does not.
//!
//! ```text
//! {"start":{"version":1, … configuration, public keys, seed …}}
//! {"in":{"at":1200,"news":{"input":{"up":true}}}}          told, so many ns after the start
//! {"out":{"at":1500,"outputs":2,"sum":3735928559}}         polled twice; what came, in one number
//! ```
//!
//! An engine is a function of these lines ([`crate`]): so there is no snapshot of its insides, which
//! every change of it would outdate, and a trace begins where the engine did. What it was told holds
//! no secret, because the engine knows none; addresses of this host and of peers are in it, and so is
//! the seed, from which transaction ids can be foretold that are used after the trace.
//!
//! What the kernel holds comes every other second, and mostly only some peers' counters moved:
//! [`News::Peers`] is the difference to the picture that the engine has.

use crate::plan::{Device, Observed, PeerState};
use crate::{Config, Engine, Input, Output};
use proto::key::{DiscoKey, NodeKey};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};
use std::time::{Duration, Instant};

/// The version of these lines.
pub const VERSION: u32 = 1;

/// What an engine starts with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// [`VERSION`].
    pub version: u32,
    /// The version of weir that recorded: another one may decide otherwise.
    pub weir: String,
    /// See [`Config`].
    pub config: Config,
    /// This node's key.
    pub me: NodeKey,
    /// Its key for discovery.
    pub disco: DiscoKey,
    /// What its chance comes from.
    pub seed: [u8; 32],
}

impl Start {
    /// An engine that starts so.
    #[must_use]
    pub fn engine(&self) -> Engine {
        Engine::new(self.config.clone(), self.me, self.disco, self.seed)
    }
}

/// One line of a trace. Times are nanoseconds since the engine's start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Line<'a> {
    /// The first one.
    Start(Cow<'a, Start>),
    /// The engine was told something.
    In {
        /// When.
        at: u64,
        /// What.
        news: News<'a>,
    },
    /// It was asked what to do, again and again.
    Out {
        /// When.
        at: u64,
        /// How often.
        outputs: usize,
        /// What came, in one number.
        sum: u32,
    },
}

/// What an engine was told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum News<'a> {
    /// This.
    Input(Cow<'a, Input>),
    /// [`Input::Observed`]: the kernel is as the engine has it, but for some peers.
    Peers {
        /// They are so now.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        set: BTreeMap<NodeKey, PeerState>,
        /// They are no longer there.
        #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
        gone: BTreeSet<NodeKey>,
    },
}

impl<'a> News<'a> {
    /// What `input` is to this engine, before it gets it.
    #[must_use]
    fn of(engine: &Engine, input: &'a Input) -> Self {
        let difference = match input {
            Input::Observed(observed) => engine.observed().and_then(|it| difference(it, observed)),
            _ => None,
        };
        difference.unwrap_or(Self::Input(Cow::Borrowed(input)))
    }

    /// The input that it was. `None` if this engine has no picture of the kernel to begin with.
    fn input(self, engine: &Engine) -> Option<Input> {
        match self {
            Self::Input(input) => Some(input.into_owned()),
            Self::Peers { set, gone } => {
                let mut observed = engine.observed()?.clone();
                let Device::Present(present) = &mut observed.device else {
                    return None;
                };
                present.peers.retain(|key, _| !gone.contains(key));
                present.peers.extend(set);
                Some(Input::Observed(observed))
            }
        }
    }
}

/// What differs, if it is only peers.
fn difference(before: &Observed, after: &Observed) -> Option<News<'static>> {
    let (Device::Present(old), Device::Present(new)) = (&before.device, &after.device) else {
        return None;
    };
    let rest = old.clone_without_peers() == new.clone_without_peers()
        && before.acl == after.acl
        && before.forwarding == after.forwarding;
    if !rest {
        return None;
    }
    let changed = |(key, peer): &(&NodeKey, &PeerState)| old.peers.get(key) != Some(peer);
    let set = new.peers.iter().filter(changed);
    let gone = old.peers.keys().filter(|key| !new.peers.contains_key(key));
    Some(News::Peers {
        set: set.map(|(key, peer)| (*key, peer.clone())).collect(),
        gone: gone.copied().collect(),
    })
}

/// Makes lines of what happens to one engine.
pub struct Recorder {
    base: Instant,
    turn: Option<Turn>,
}

/// Questions that came at one time.
struct Turn {
    at: Instant,
    outputs: usize,
    sum: Sum,
}

impl Recorder {
    /// Of an engine that starts at `base`.
    #[must_use]
    pub fn new(base: Instant) -> Self {
        Self { base, turn: None }
    }

    /// The engine is about to be told something.
    pub fn input(
        &mut self,
        now: Instant,
        engine: &Engine,
        input: &Input,
        mut tell: impl FnMut(Line<'_>),
    ) {
        self.end(&mut tell);
        tell(Line::In {
            at: nanos(self.base, now),
            news: News::of(engine, input),
        });
    }

    /// The engine was asked, and answered.
    pub fn output(&mut self, now: Instant, output: &Output, mut tell: impl FnMut(Line<'_>)) {
        if self.turn.as_ref().is_some_and(|turn| turn.at != now) {
            self.end(&mut tell);
        }
        let turn = self.turn.get_or_insert(Turn {
            at: now,
            outputs: 0,
            sum: Sum::default(),
        });
        turn.outputs += 1;
        turn.sum.add(self.base, output);
        if matches!(output, Output::Timeout(_)) {
            self.end(&mut tell);
        }
    }

    fn end(&mut self, tell: &mut impl FnMut(Line<'_>)) {
        if let Some(Turn { at, outputs, sum }) = self.turn.take() {
            tell(Line::Out {
                at: nanos(self.base, at),
                outputs,
                sum: sum.0,
            });
        }
    }
}

/// Why a trace does not go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// A second start.
    #[error("a trace has one start, and it is the first line")]
    Start,
    /// A difference to what is not known.
    #[error("peers are said to have changed, but this engine has no picture of the kernel")]
    Picture,
    /// The engine does something else than the one that was recorded.
    #[error("{at:?} after its start the engine decides otherwise than was recorded: {outputs:?}")]
    Differs {
        /// When.
        at: Duration,
        /// What it wants now.
        outputs: Vec<Output>,
    },
}

/// An engine that goes through a trace again.
pub struct Replay {
    engine: Engine,
    base: Instant,
}

impl Replay {
    /// At its start; `base` may be any time.
    #[must_use]
    pub fn new(start: &Start, base: Instant) -> Self {
        let engine = start.engine();
        Self { engine, base }
    }

    /// The engine as it is after the lines so far.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// When a time of the trace is.
    #[must_use]
    pub fn at(&self, nanos: u64) -> Instant {
        self.base + Duration::from_nanos(nanos)
    }

    /// Does what a line says. Returns what the engine wanted.
    ///
    /// # Errors
    /// [`Wrong`]. After [`Wrong::Differs`] it may go on, but it is another story.
    pub fn take(&mut self, line: Line<'_>) -> Result<Vec<Output>, Wrong> {
        match line {
            Line::Start(_) => Err(Wrong::Start),
            Line::In { at, news } => {
                let input = news.input(&self.engine).ok_or(Wrong::Picture)?;
                self.engine.handle(self.at(at), input);
                Ok(Vec::new())
            }
            Line::Out { at, outputs, sum } => {
                let now = self.at(at);
                let (mut found, mut made) = (Sum::default(), Vec::new());
                for _ in 0..outputs {
                    let output = self.engine.poll(now);
                    found.add(self.base, &output);
                    let last = matches!(output, Output::Timeout(_));
                    made.push(output);
                    if last {
                        break;
                    }
                }
                if found.0 == sum {
                    return Ok(made);
                }
                Err(Wrong::Differs {
                    at: Duration::from_nanos(at),
                    outputs: made,
                })
            }
        }
    }
}

fn nanos(base: Instant, now: Instant) -> u64 {
    let since = now.saturating_duration_since(base);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// All that was answered, in one number (FNV-1a).
struct Sum(u32);

impl Default for Sum {
    fn default() -> Self {
        Self(0x811c_9dc5)
    }
}

impl Sum {
    fn add(&mut self, base: Instant, output: &Output) {
        // Nothing is written anywhere that could fail.
        let _ = match output {
            Output::Timeout(at) => write!(self, "until {}", nanos(base, *at)),
            other => write!(self, "{other:?}"),
        };
    }
}

impl Write for Sum {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            self.0 = (self.0 ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        }
        Ok(())
    }
}
