//! The floors: programs that do less than weir's, and their tables.
//!
//! *One line* has a table of as many slabs and lines as weir's own for the same policy. Its peers
//! are spread over all of them by multiplying the numbers of their addresses: peer `i` goes to line
//! `i * STEP` modulo the number of lines, and as the two have no divisor in common, each has a line
//! of its own. So it needs neither pilots nor a second look, which no table of arbitrary addresses
//! could do without.

use agent::kernel::bpf::line_shift;
use anyhow::{Context, ensure};
use aya::maps::{Array, ArrayOfMaps, HashMap, PerCpuArray};
use aya::programs::{SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use ebpf::abi::{Addr, Identity, side};
use ebpf::addresses::{LINE_BYTES, Near, Owned, SLAB_LINES, SLAB_WORDS, Slab, near};
use ebpf::packet::protocol;
use engine::acl::{Acl as Lowered, addresses};

use super::frames::{allowed_port, peer};
use super::rules::{self, OUT};

/// The object, aligned as the loader wants it.
static FLOOR: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../ebpf/floor.bpf.o"));

/// A prime: neighbours end up far from each other, in any table that has not as many lines as it.
const STEP: u64 = 62_989;

/// The least that a filter with state could do with the kernel's own tables, with this many rules;
/// on the device of this thread's namespace.
pub fn kernel_tables(rules: u32) -> anyhow::Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    for table in ["PEERS", "GRANTS"] {
        loader.map_max_entries(table, rules);
    }
    let mut loaded = loader.load(FLOOR)?;
    let mut peers: HashMap<_, u32, u32> =
        HashMap::try_from(loaded.take_map("PEERS").context("no table of peers")?)?;
    let mut grants: HashMap<_, u32, u32> =
        HashMap::try_from(loaded.take_map("GRANTS").context("no table of grants")?)?;
    for number in 0..rules {
        let address = u32::from_ne_bytes(peer(number).octets());
        peers.insert(address, number, 0)?;
        grants.insert(number, u32::from(allowed_port(number)), 0)?;
    }
    attach(&mut loaded, "floor")?;
    Ok(loaded)
}

/// What reads one line and nothing else, with this many rules; on the device of this thread's
/// namespace. Linux 6.2 takes its tables, 6.1 does not.
pub fn one_line(rules: u32) -> anyhow::Result<Ebpf> {
    let shift = line_shift()?;
    let mut lowered = Lowered::default();
    lowered.lower(&rules::filter(rules), &rules::me(), &rules::peers(rules))?;
    let laid = addresses::lay(lowered.tables(), shift).context("weir's table has no room")?;
    let slabs = laid.book.line_slabs;
    let lines = u64::from(slabs) * u64::from(SLAB_LINES);
    ensure!(
        lines >= u64::from(rules) && !lines.is_multiple_of(STEP),
        "{rules} peers have no lines of their own among {lines}"
    );
    let mut loaded = Ebpf::load(FLOOR)?;
    let outer = loaded
        .take_map("SLABS_OF_LINES")
        .context("no table of slabs")?;
    let mut outer: ArrayOfMaps<_, Array<_, [u64; SLAB_WORDS]>> = ArrayOfMaps::try_from(outer)?;
    for (number, slab) in (0..).zip(filled(rules, slabs, shift)?) {
        let mut map: Array<_, [u64; SLAB_WORDS]> = Array::create(1, 0)?;
        map.set(0, slab.words, 0)?;
        outer.set(number, &map, 0)?;
    }
    let way = loaded.take_map("WAY").context("no way to a line")?;
    let mut way: Array<_, [u64; 5]> = Array::try_from(way)?;
    let [factor, offset] = spread(lines);
    let [slabs, each, shift] = [slabs, SLAB_LINES, shift].map(u64::from);
    way.set(0, [factor, offset, slabs, each, shift], 0)?;
    attach(&mut loaded, "one_line")?;
    Ok(loaded)
}

/// Packets that *one line* let pass.
pub fn passed(loaded: &Ebpf) -> anyhow::Result<u64> {
    let passed = loaded.map("PASSED").context("no counter")?;
    let passed: PerCpuArray<_, u64> = PerCpuArray::try_from(passed)?;
    Ok(passed.get(&0, 0)?.iter().sum())
}

/// A factor and what is added, so that the address of peer `i` times the one plus the other has
/// `(i * STEP + 1/2) / lines` behind the point: the middle of the line that it goes to.
fn spread(lines: u64) -> [u64; 2] {
    let whole = 1_u128 << 64;
    let factor = (whole * u128::from(STEP % lines) / u128::from(lines)) as u64;
    let middle = (whole / u128::from(2 * lines)) as u64;
    let first = u64::from(peer(0).to_bits()).wrapping_mul(factor);
    [factor, middle.wrapping_sub(first)]
}

/// The slabs, with a line for each peer.
fn filled(rules: u32, slabs: u32, shift: u32) -> anyhow::Result<Vec<Slab>> {
    let mut filled = vec![Slab::EMPTY; slabs as usize];
    let lines = u64::from(slabs) * u64::from(SLAB_LINES);
    for number in 0..rules {
        let place = u64::from(number) * STEP % lines;
        let slab = &mut filled[(place / u64::from(SLAB_LINES)) as usize];
        let at = u64::from(shift) + place % u64::from(SLAB_LINES) * LINE_BYTES as u64;
        ensure!(slab.put_line(at, &line(number)), "no such line: {place}");
    }
    Ok(filled)
}

/// A peer's line, as weir writes it.
fn line(number: u32) -> Owned {
    let port = allowed_port(number);
    let mut ranges = Near::ASK.ranges;
    ranges[0] = [port, port];
    let egress = Near {
        kind: near::RANGES,
        protocol: protocol::UDP,
        ranges,
    };
    let identity = Identity {
        as_source: number + 1,
        as_destination: number + 1,
        side: side::PEER,
        share: 0,
    };
    let addr = Addr::from_v4_word(u32::from_ne_bytes(peer(number).octets()));
    Owned::new(addr, identity, [Near::ASK, egress])
}

fn attach(loaded: &mut Ebpf, name: &str) -> anyhow::Result<()> {
    let program = loaded.program_mut(name).context("no program")?;
    let program: &mut SchedClassifier = program.try_into()?;
    program.load()?;
    program.attach(OUT, TcAttachType::Egress)?;
    Ok(())
}
