//! [`Acl`]: programs on one device, with their maps, as the rest of the agent uses them.

use super::addresses::Addresses;
use super::events::Events;
use super::flows::{FlowTable, Flows};
use super::policy::{self, Settling, Slot};
use super::tracks::Tracks;
use super::view::View;
use super::{AclError, How, Mapped, Options, PASSED, RawMap, Run, attach, now_ns, test_run};
use ebpf::abi::{Active, Counter, Direction, Dropped, Flow, FlowKey};
use ebpf::packet::{Packet, Tuple, What, protocol, tcp};
use ebpf::reason::OUTCOMES;
use ebpf::verdict::{Store, Verdict};
use engine::acl::{Change, Tables};
use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Entries that a dump shows of one table.
const DUMPED_ENTRIES: usize = 4_096;

/// The active word, mapped: one aligned store makes a policy count.
pub(super) struct ActiveWord(pub(super) Mapped);

impl ActiveWord {
    pub(super) fn load(&self) -> Active {
        let word = self.0.words().first();
        Active::from_word(word.map_or(0, |word| word.load(Ordering::Acquire)))
    }

    pub(super) fn store(&self, active: Active) {
        if let Some(word) = self.0.words().first() {
            word.store(active.word(), Ordering::Release);
        }
    }
}

/// Programs that are attached to one device, and their maps.
pub struct Acl {
    pub(super) index: u32,
    pub(super) how: How,
    pub(super) folder: PathBuf,
    /// Where the maps of this layout are pinned.
    pub(super) layout: PathBuf,
    pub(super) word: ActiveWord,
    pub(super) shapes: RawMap,
    pub(super) tracks: Tracks,
    pub(super) flows: Flows,
    pub(super) shares: RawMap,
    /// When flows were last counted anew.
    pub(super) recounted_ns: Option<u64>,
    pub(super) fragments: RawMap,
    pub(super) counters: RawMap,
    pub(super) mark: RawMap,
    pub(super) answers: RawMap,
    pub(super) lost: RawMap,
    /// Opened when somebody first wants to see drops.
    pub(super) events: Option<Events>,
    pub(super) addresses: Addresses,
    pub(super) outer: [RawMap; 4],
    pub(super) slots: [Option<Slot>; 2],
    /// Until when packets may be in the idle slot.
    pub(super) settling: Option<Settling>,
    /// By direction.
    pub(super) programs: [Option<OwnedFd>; 2],
    /// Programs that wait for the first policy before they take over from another layout's.
    pub(super) waiting: Option<attach::Waiting>,
}

impl Acl {
    /// Attaches the programs to the device, or takes over the ones that a former agent left.
    /// Without a policy yet they drop everything.
    ///
    /// # Errors
    /// [`AclError`]; nothing is attached then that was not before.
    pub fn attach_or_adopt(interface: &str, index: u32, bpf_dir: &Path) -> Result<Self, AclError> {
        attach::open(interface, index, bpf_dir, Options::default())
    }

    /// The same, for tests of other kernels and layouts.
    ///
    /// # Errors
    /// [`AclError`].
    pub fn open(
        interface: &str,
        index: u32,
        bpf_dir: &Path,
        options: Options,
    ) -> Result<Self, AclError> {
        attach::open(interface, index, bpf_dir, options)
    }

    /// Whether the programs are attached to the device of this index, and a policy can be written
    /// for them: what it needs is pinned in a folder that somebody may have removed.
    #[must_use]
    pub fn is_attached(&self, index: u32) -> bool {
        let here = self.index == index && self.layout.exists();
        here && attach::is_attached(self.how, &self.folder, index)
    }

    /// Writes a policy: by `change` alone if the maps hold the policy before it, whole without.
    /// Sizes were checked when it was lowered; if the kernel has no memory for it, the old one stays.
    ///
    /// # Errors
    /// [`AclError`]; the old policy stays active.
    pub fn set(&mut self, tables: &Tables, change: Option<&Change>) -> Result<(), AclError> {
        policy::set(self, tables, change)?;
        let Some(mut waiting) = self.waiting.take() else {
            return Ok(());
        };
        let taken = attach::take_over(self, &mut waiting);
        if taken.is_err() {
            // The old programs still decide; the next policy tries again.
            self.waiting = Some(waiting);
        }
        self.recounted_ns = None;
        taken
    }

    /// Returns when nothing is under way that the last [`Self::set`] began. For tests: the next one
    /// waits by itself.
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn settle(&mut self) -> Result<(), AclError> {
        policy::settled(self)
    }

    /// The active word.
    #[must_use]
    pub fn active(&self) -> Active {
        self.word.load()
    }

    /// Under which epoch flows are good now; `None` while no policy counts.
    #[must_use]
    pub fn epoch(&self) -> Option<u32> {
        let epoch = self.active().epoch;
        (epoch != 0).then_some(epoch)
    }

    /// How the programs are attached.
    #[must_use]
    pub fn hook(&self) -> &'static str {
        match self.how {
            How::Tcx => "tcx",
            How::Clsact => "clsact",
        }
    }

    /// Packets by direction and verdict, in a fixed order.
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn counters(&self) -> Result<Vec<(Direction, Verdict, u64)>, AclError> {
        let totals = self.totals()?.into_iter();
        Ok(totals
            .map(|(direction, verdict, total)| (direction, verdict, total.packets))
            .collect())
    }

    fn totals(&self) -> Result<Vec<(Direction, Verdict, Counter)>, AclError> {
        let mut totals = Vec::with_capacity(2 * OUTCOMES as usize);
        for direction in Direction::ALL {
            for verdict in Verdict::all() {
                let index = verdict.counter(direction);
                let mut total = Counter::default();
                for share in self.counters.get_per_cpu::<_, Counter>(&index)? {
                    total.packets += share.packets;
                    total.bytes += share.bytes;
                }
                totals.push((direction, verdict, total));
            }
        }
        Ok(totals)
    }

    /// What the programs have told of dropped packets since the last call, oldest first, each with
    /// the time that has gone by since.
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn drops(&mut self) -> Result<Vec<(Duration, Dropped)>, AclError> {
        let events = match &mut self.events {
            Some(events) => events,
            none => none.insert(Events::open(&self.layout)?),
        };
        let events = events.take();
        let now_ns = now_ns();
        let age = |event: &Dropped| Duration::from_nanos(now_ns.saturating_sub(event.time_ns));
        Ok(events
            .into_iter()
            .map(|event| (age(&event), event))
            .collect())
    }

    /// How many events of dropped packets found the buffer full, since the programs were loaded.
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn lost(&self) -> Result<u64, AclError> {
        Ok(self.lost.get_per_cpu::<_, u64>(&0_u32)?.iter().sum())
    }

    /// What the programs would do, as the maps are now.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        View::new(self)
    }

    /// Runs a program on `packet` (an IP packet of at least 14 bytes) by `BPF_PROG_TEST_RUN`: it
    /// decides, counts and keeps state as for one from the wire. For tests and measurements.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn run(&self, direction: Direction, packet: &[u8], repeat: u32) -> io::Result<Run> {
        let program = self.programs[direction as usize].as_ref();
        let program = program.ok_or(io::ErrorKind::NotFound)?;
        test_run(program, PASSED, packet, repeat)
    }

    /// Known flows, at most `limit`.
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn flows(&self, limit: usize) -> Result<Vec<(Store, FlowKey, Flow)>, AclError> {
        Ok(self.table()?.iter().take(limit).collect())
    }

    /// The table of flows itself, for tests.
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn table(&self) -> Result<FlowTable, AclError> {
        self.flows.table()
    }

    /// All that the maps hold, as text for a failure's folder.
    ///
    /// # Errors
    /// [`AclError::Map`].
    pub fn dump(&self) -> Result<String, AclError> {
        let mut text = format!("active {:?}, attached by {:?}\n", self.active(), self.how);
        for (direction, verdict, total) in self.totals()? {
            if total.packets != 0 {
                let Counter { packets, bytes } = total;
                let name = direction.name();
                let _ = writeln!(text, "{name} {verdict:?}: {packets} packets, {bytes} bytes");
            }
        }
        for (store, key, flow) in self.flows(DUMPED_ENTRIES)? {
            let _ = writeln!(text, "flow {store:?} {key:?} {flow:?}");
        }
        for (number, slot) in self.slots.iter().enumerate() {
            if let Some(slot) = slot {
                let _ = writeln!(text, "slot {number}");
                let number = u32::try_from(number).unwrap_or(0);
                for line in self.addresses.lines(number, &slot.book(), DUMPED_ENTRIES) {
                    let _ = writeln!(text, "address {line:?}");
                }
                slot.dump(&mut text, DUMPED_ENTRIES)?;
            }
        }
        Ok(text)
    }
}

/// The first packet of a flow: who initiates what to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct First {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port; 0 where the protocol has none.
    pub port: u16,
    /// Which way it crosses the device.
    pub direction: Direction,
}

impl First {
    /// The packet that begins such a flow: a SYN, an INIT, a question, or just a datagram.
    #[must_use]
    pub fn packet(&self) -> Packet {
        let (what, tcp_flags) = match self.protocol {
            protocol::TCP => (What::Segment, tcp::SYN),
            protocol::SCTP => (What::SctpInit, 0),
            protocol::ICMP if self.dst.is_ipv4() => (What::Request, 0),
            protocol::ICMPV6 if self.dst.is_ipv6() => (What::Request, 0),
            _ => (What::Datagram, 0),
        };
        let ports =
            matches!(what, What::Segment | What::SctpInit) || self.protocol == protocol::UDP;
        Packet {
            tuple: Tuple {
                src: self.src.into(),
                dst: self.dst.into(),
                src_port: 0,
                dst_port: if ports { self.port } else { 0 },
                protocol: self.protocol,
                what,
            },
            tcp_flags,
            fragment_protocol: self.protocol,
            ..Packet::NONE
        }
    }
}
