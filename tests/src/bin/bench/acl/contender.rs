//! Who decides in a namespace, and whether it decides as it should.

use std::process::Command;

use anyhow::{Context, ensure};
use aya::Ebpf;
use ebpf::abi::Direction;
use engine::acl::Acl as Lowered;
use tests::packet;

use super::floor;
use super::frames::{Frames, LOCAL, Mix, allowed_port, peer, source_port};
use super::ground::{Ground, Weir};
use super::rules::{self, Form, Hook};

/// Packets with which a contender shows that it decides right.
const PROOF: u32 = 640;
/// Packets of which all come through, if they may: nothing is queued, nothing is lost.
const MISSED: u64 = 0;

/// Who decides.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// Nobody: what the way itself costs.
    Nobody,
    /// An empty chain that drops: what the way to that point costs.
    Wall,
    /// A program where weir's is, which decides nothing: passes all, or drops all.
    Empty(bool),
    /// The least that a filter with state could do with the kernel's tables.
    Floor,
    /// What reads one line of memory and nothing else.
    OneLine,
    /// weir's programs.
    Weir,
    /// A chain of nftables.
    Nftables(Hook, Form),
    /// A chain of iptables, loaded by this program.
    Iptables(&'static str),
}

/// A contender in its namespace.
pub struct Contender {
    /// As tables and plots call it.
    pub name: String,
    /// Who it is.
    pub who: Who,
    /// Rules that it has.
    pub rules: u32,
    /// Where it decides.
    pub ground: Ground,
    weir: Option<Weir>,
    /// Attached as long as it is held.
    loaded: Option<Ebpf>,
}

impl Contender {
    /// Makes one and loads its rules; those of nftables with counters, until [`Self::ready`].
    pub fn make(name: &str, who: Who, rules: u32) -> anyhow::Result<Self> {
        let ground = Ground::make()?;
        let mut made = Self {
            name: name.to_owned(),
            who,
            rules,
            ground,
            weir: None,
            loaded: None,
        };
        match who {
            Who::Nobody => {}
            Who::Empty(passes) => made.loaded = Some(made.ground.empty(passes)?),
            Who::Floor => {
                made.ground.enter()?;
                made.loaded = Some(floor::kernel_tables(rules)?);
            }
            Who::OneLine => {
                made.ground.enter()?;
                made.loaded = Some(floor::one_line(rules)?);
            }
            Who::Wall => made.load(Hook::Device, Form::Nothing, false)?,
            // What only tracks needs rules at first, to let flows begin.
            Who::Nftables(Hook::Tracked, form) => {
                made.load(Hook::Tracked, Form::Set, true)?;
                let seconds = if form == Form::Nothing { "600" } else { "1" };
                made.ground
                    .set("netfilter/nf_conntrack_udp_timeout", seconds)?;
            }
            Who::Nftables(hook, form) => made.load(hook, form, true)?,
            Who::Iptables(program) => {
                let restore = format!("{program}-restore");
                made.ground.run(&[&restore], &rules::iptables(rules))?;
            }
            Who::Weir => {
                made.ground.enter()?;
                let mut weir = made.ground.weir()?;
                let mut lowered = Lowered::default();
                let (filter, peers) = (rules::filter(rules), rules::peers(rules));
                let change = lowered.lower(&filter, &rules::me(), &peers)?;
                weir.acl()?.set(lowered.tables(), Some(&change))?;
                made.weir = Some(weir);
            }
        }
        Ok(made)
    }

    fn load(&self, hook: Hook, form: Form, counted: bool) -> anyhow::Result<()> {
        let text = rules::nftables(hook, form, self.rules, counted);
        self.ground.run(&["nft", "-f", "-"], &text).map(|_| ())
    }

    /// Takes the counters out of its rules: what follows is measured.
    pub fn ready(&self) -> anyhow::Result<()> {
        match self.who {
            Who::Nftables(hook, form) => self.load(hook, form, false),
            Who::Nobody
            | Who::Wall
            | Who::Empty(_)
            | Who::Floor
            | Who::OneLine
            | Who::Weir
            | Who::Iptables(_) => Ok(()),
        }
    }

    /// Makes every flow of this mix, which has one source port, known: both sides have spoken,
    /// and the first one again.
    pub fn establish(&mut self, mix: &Mix) -> anyhow::Result<()> {
        let packets = mix.packets_for_all();
        let forth = Frames::of(mix)?;
        self.ground.enter()?;
        forth.send(self.ground.arrival, packets)?;
        match &mut self.weir {
            Some(weir) => {
                let acl = weir.acl()?;
                let local = (LOCAL.into(), source_port(mix.first_source));
                for number in (0..mix.peers).map(|number| number * mix.stride) {
                    let remote = (peer(number).into(), allowed_port(number));
                    let reply = packet::udp(remote, local, &[0; 36]);
                    let run = acl.run(Direction::Ingress, &reply, 1)?;
                    ensure!(run.passes, "an answer of {remote:?} did not pass");
                }
            }
            // Which takes the first packet's word for it.
            None if self.who == Who::Floor => {}
            None => {
                let replies = Mix {
                    replies: true,
                    ..*mix
                };
                let back = Frames::of(&replies)?;
                back.send(self.ground.arrival, packets)?;
            }
        }
        forth.send(self.ground.arrival, packets)?;
        Ok(())
    }

    /// Sends packets of this mix and makes sure that all of them pass, or none.
    pub fn prove(&mut self, mix: &Mix, frames: &Frames) -> anyhow::Result<()> {
        self.ground.enter()?;
        let Some(before) = self.passed()? else {
            return Ok(());
        };
        frames.send(self.ground.arrival, PROOF)?;
        let passed = self.passed()?.unwrap_or(before) - before;
        let expected = if mix.allowed {
            u64::from(PROOF)
        } else {
            MISSED
        };
        ensure!(
            passed == expected,
            "{} with {} rules let {passed} of {PROOF} packets pass instead of {expected}: {mix:?}",
            self.name,
            self.rules
        );
        Ok(())
    }

    /// Packets that it let pass so far; `None` if it does not count.
    fn passed(&mut self) -> anyhow::Result<Option<u64>> {
        match self.who {
            Who::Nobody | Who::Wall | Who::Empty(_) | Who::Floor => Ok(None),
            Who::OneLine => {
                let loaded = self.loaded.as_ref().context("no program")?;
                Ok(Some(floor::passed(loaded)?))
            }
            Who::Weir => {
                let acl = self.weir.as_mut().context("no programs")?.acl()?;
                let counters = acl.counters()?.into_iter();
                let passed = counters
                    .filter(|(way, verdict, _)| *way == Direction::Egress && verdict.passes())
                    .map(|(_, _, packets)| packets);
                Ok(Some(passed.sum()))
            }
            Who::Nftables(..) => {
                let listed = self.ground.run(&["nft", "list", "ruleset"], "")?.stdout;
                let words: Vec<&str> = listed.split_whitespace().collect();
                let counts = words.windows(2).filter(|pair| pair[0] == "packets");
                Ok(Some(
                    counts.filter_map(|pair| pair[1].parse::<u64>().ok()).sum(),
                ))
            }
            Who::Iptables(program) => {
                let words = [program, "-n", "-v", "-x", "-L", "FORWARD"];
                let listed = self.ground.run(&words, "")?.stdout;
                let rules = listed.lines().filter(|line| line.contains(" ACCEPT "));
                let counts = rules.filter_map(|line| line.split_whitespace().next());
                Ok(Some(
                    counts.filter_map(|word| word.parse::<u64>().ok()).sum(),
                ))
            }
        }
    }
}

/// The first line that `program --version` prints, if there is such a program.
pub fn version(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.lines().next()?.trim().to_owned())
}
