//! Live frames: UDP packets that the kernel makes and sends through its own stack, thousands in one
//! system call, each with its own addresses and ports.
//!
//! `BPF_PROG_TEST_RUN` with live frames runs an XDP program on fresh frames of a device and gives
//! what it passes to the stack, as a driver would. The program here writes the headers: a peer and
//! a source port by chance, or one of few. It is put together at run time, instruction by
//! instruction, because its constants are the experiment; no map, so that nothing but the frame is
//! touched.

use std::net::Ipv4Addr;

use anyhow::{Context, ensure};
use aya::programs::{TestRunAttrs, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader, TestRun as _};
use rustix::time::{ClockId, clock_gettime};

/// The node whose packets are judged.
pub const LOCAL: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 1);
/// Peers have the addresses from here on.
const FIRST_PEER: u32 = 0x6441_0000;
/// The hardware address of the device that frames arrive on.
pub const DEVICE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Source ports begin here.
const FIRST_SOURCE_PORT: u16 = 20_000;
/// Ports that rules allow begin here; each peer has one.
const FIRST_PORT: u16 = 1_024;
/// Distinct allowed ports, a power of two.
const PORTS: u32 = 1_024;
/// A port that no rule allows.
const FORBIDDEN_PORT: u16 = 60_000;
/// Frames that the kernel gives to the stack at once: what a driver's poll handles.
const BATCH: u32 = 64;
/// An IP packet of 64 bytes.
const IP_LENGTH: u16 = 64;
/// Ethernet, IPv4 without options, UDP.
const HEADERS: i32 = 14 + 20 + 8;

/// The address of a peer.
pub fn peer(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(FIRST_PEER + number)
}

/// The port that peer's rule allows.
pub fn allowed_port(number: u32) -> u16 {
    FIRST_PORT + (number % PORTS) as u16
}

/// The source port of this number.
pub fn source_port(number: u32) -> u16 {
    FIRST_SOURCE_PORT + number as u16
}

/// Which packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// How many peers are met, by chance.
    pub peers: u32,
    /// Of the peers `0, stride, 2 stride …`.
    pub stride: u32,
    /// How many source ports are met, by chance.
    pub source_ports: u32,
    /// From this one on.
    pub first_source: u32,
    /// To the port that the peer's rule allows, or to one that no rule does.
    pub allowed: bool,
    /// The answers instead.
    pub replies: bool,
}

impl Mix {
    /// Distinct flows.
    pub fn flows(&self) -> u32 {
        self.peers * self.source_ports
    }

    /// Packets, each by chance, after which every flow has almost surely been met.
    pub fn packets_for_all(&self) -> u32 {
        let flows = f64::from(self.flows());
        // Coupon collector: one flow in e^9 runs is left out.
        (flows * (flows.ln() + 9.0)) as u32 + 64
    }
}

/// A program that makes one mix.
pub struct Frames {
    loaded: Ebpf,
    template: Vec<u8>,
}

impl Frames {
    /// Assembles and loads it.
    pub fn of(mix: &Mix) -> anyhow::Result<Self> {
        let object = object(SECTION, NAME, &program(mix));
        let mut loaded = EbpfLoader::new().btf(None).load(&object)?;
        let program = loaded.program_mut(NAME).context("no program")?;
        let program: &mut Xdp = program.try_into()?;
        program.load()?;
        Ok(Self {
            loaded,
            template: template(),
        })
    }

    /// Sends `count` frames into the device of this index in the thread's network namespace; the
    /// CPU time that this thread then spent, in nanoseconds.
    pub fn send(&self, device: u32, count: u32) -> anyhow::Result<u64> {
        let program = self.loaded.program(NAME).context("no program")?;
        let program: &Xdp = program.try_into()?;
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
        let mut context = [0_u8; 24];
        context[4..8].copy_from_slice(&(self.template.len() as u32).to_ne_bytes());
        context[12..16].copy_from_slice(&device.to_ne_bytes());
        let options = TestRunOptions {
            data_in: Some(&self.template),
            ctx_in: Some(&context),
            repeat: count,
            attrs: TestRunAttrs::new().xdp_live_frames(BATCH.min(count)),
            ..TestRunOptions::new()
        };
        let before = cpu_ns();
        let result = program.test_run(options);
        let spent = cpu_ns() - before;
        result.context("the kernel makes no live frames (Linux 5.18 does)")?;
        Ok(spent)
    }
}

fn cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// What every frame starts from: Ethernet, IPv4, UDP without checksum, zeros.
fn template() -> Vec<u8> {
    let mut frame = Vec::with_capacity(78);
    frame.extend(DEVICE_MAC);
    frame.extend([2, 0, 0, 0, 0, 2, 0x08, 0x00]);
    frame.extend([0x45, 0]);
    frame.extend(IP_LENGTH.to_be_bytes());
    frame.extend([0, 0, 0, 0, TTL, UDP, 0, 0]);
    frame.extend(LOCAL.octets());
    frame.extend(peer(0).octets());
    frame.extend([0; 4]);
    frame.extend((IP_LENGTH - 20).to_be_bytes());
    frame.resize(usize::from(IP_LENGTH) + 14, 0);
    frame
}

const TTL: u8 = 64;
const UDP: u8 = 17;
/// aya's word for programs at XDP.
const SECTION: &str = "xdp";
const NAME: &str = "frames";

/// The IPv4 checksum of every frame: the program keeps the sum of identification and peer address
/// the same, so that it need not be computed.
fn checksum() -> u16 {
    let words = [
        0x4500,
        u32::from(IP_LENGTH),
        // Identification and the number of the peer together.
        0xffff,
        0,
        u32::from(TTL) << 8 | u32::from(UDP),
        LOCAL.to_bits() >> 16,
        LOCAL.to_bits() & 0xffff,
        FIRST_PEER >> 16,
        FIRST_PEER & 0xffff,
    ];
    let mut sum: u32 = words.iter().sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// One instruction as the kernel reads it (`struct bpf_insn`).
fn instruction(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> [u8; 8] {
    let [o0, o1] = offset.to_le_bytes();
    let [i0, i1, i2, i3] = immediate.to_le_bytes();
    [code, src << 4 | dst, o0, o1, i0, i1, i2, i3]
}

/// The opcodes in use (Documentation/bpf/standardization/instruction-set.rst).
mod op {
    /// 64-bit move between registers.
    pub const MOV_REG: u8 = 0xbf;
    /// 64-bit move of a number.
    pub const MOV: u8 = 0xb7;
    /// 64-bit addition of a number.
    pub const ADD64: u8 = 0x07;
    /// 32-bit move between registers.
    pub const MOV32_REG: u8 = 0xbc;
    /// 32-bit addition of a register.
    pub const ADD_REG: u8 = 0x0c;
    /// 32-bit arithmetic with a number.
    pub const ADD: u8 = 0x04;
    pub const MUL: u8 = 0x24;
    pub const AND: u8 = 0x54;
    pub const SHIFT_RIGHT: u8 = 0x74;
    pub const MODULO: u8 = 0x94;
    pub const XOR: u8 = 0xa4;
    /// To network order; the number says how many bits.
    pub const TO_BE: u8 = 0xdc;
    pub const LOAD_WORD: u8 = 0x61;
    pub const STORE_HALF: u8 = 0x6b;
    pub const JUMP: u8 = 0x05;
    pub const JUMP_IF_GREATER: u8 = 0x2d;
    pub const CALL: u8 = 0x85;
    pub const EXIT: u8 = 0x95;
}

/// `bpf_get_prandom_u32`.
const RANDOM: i32 = 7;
const XDP_DROP: i32 = 1;
const XDP_PASS: i32 = 2;

/// The instructions: r7 becomes the peer's number, r8 the source port, r2 the frame.
fn program(mix: &Mix) -> Vec<u8> {
    let mut code = vec![
        instruction(op::MOV_REG, 6, 1, 0, 0),
        instruction(op::CALL, 0, 0, 0, RANDOM),
        instruction(op::MOV32_REG, 7, 0, 0, 0),
        instruction(op::CALL, 0, 0, 0, RANDOM),
        instruction(op::MOV32_REG, 8, 0, 0, 0),
        instruction(op::LOAD_WORD, 2, 6, 0, 0),
        instruction(op::LOAD_WORD, 3, 6, 4, 0),
        instruction(op::MOV_REG, 4, 2, 0, 0),
        instruction(op::ADD64, 4, 0, 0, HEADERS),
        instruction(op::MOV, 0, 0, 0, XDP_DROP),
        instruction(op::JUMP_IF_GREATER, 4, 3, 1, 0),
        instruction(op::JUMP, 0, 0, 1, 0),
        instruction(op::EXIT, 0, 0, 0, 0),
        instruction(op::MODULO, 7, 0, 0, mix.peers as i32),
        instruction(op::MUL, 7, 0, 0, mix.stride as i32),
        instruction(op::MODULO, 8, 0, 0, mix.source_ports as i32),
        instruction(op::ADD, 8, 0, 0, i32::from(source_port(mix.first_source))),
        // r0, r1: what the peer's number adds to the halves of its address.
        instruction(op::MOV32_REG, 0, 7, 0, 0),
        instruction(op::AND, 0, 0, 0, 0xffff),
        instruction(op::MOV32_REG, 1, 7, 0, 0),
        instruction(op::SHIFT_RIGHT, 1, 0, 0, 16),
        // r5: the identification that makes up for it in the checksum.
        instruction(op::MOV32_REG, 5, 0, 0, 0),
        instruction(op::ADD_REG, 5, 1, 0, 0),
        instruction(op::MOV32_REG, 4, 5, 0, 0),
        instruction(op::SHIFT_RIGHT, 4, 0, 0, 16),
        instruction(op::AND, 5, 0, 0, 0xffff),
        instruction(op::ADD_REG, 5, 4, 0, 0),
        instruction(op::XOR, 5, 0, 0, 0xffff),
        instruction(op::ADD, 1, 0, 0, (FIRST_PEER >> 16) as i32),
    ];
    code.extend(stores(mix));
    code.push(instruction(op::MOV, 0, 0, 0, XDP_PASS));
    code.push(instruction(op::EXIT, 0, 0, 0, 0));
    code.concat()
}

/// Writes into the frame what differs between frames, and what forwarding changed in a page that
/// comes back.
fn stores(mix: &Mix) -> Vec<[u8; 8]> {
    let (peer_at, local_at) = if mix.replies { (26, 30) } else { (30, 26) };
    let (source_at, destination_at) = if mix.replies { (36, 34) } else { (34, 36) };
    let (ports, first_port) = if mix.allowed {
        (PORTS as i32 - 1, FIRST_PORT)
    } else {
        (0, FORBIDDEN_PORT)
    };
    let mut code = vec![
        instruction(op::AND, 7, 0, 0, ports),
        instruction(op::ADD, 7, 0, 0, i32::from(first_port)),
    ];
    let halves = [
        (5, 18),
        (1, peer_at),
        (0, peer_at + 2),
        (8, source_at),
        (7, destination_at),
    ];
    for (register, at) in halves {
        code.push(instruction(op::TO_BE, register, 0, 0, 16));
        code.push(instruction(op::STORE_HALF, 2, register, at, 0));
    }
    let [a, b, c, d] = LOCAL.octets();
    let numbers = [
        ([TTL, UDP], 22),
        (checksum().to_be_bytes(), 24),
        ([a, b], local_at),
        ([c, d], local_at + 2),
    ];
    for (half, at) in numbers {
        let half = i32::from(u16::from_ne_bytes(half));
        code.push(instruction(op::MOV, 1, 0, 0, half));
        code.push(instruction(op::STORE_HALF, 2, 1, at, 0));
    }
    code
}

/// What the floor of the programs at tc is called.
pub const EMPTY: &str = "empty";

/// The shortest program for tc: this action, whatever the packet.
pub fn empty(action: i32) -> Vec<u8> {
    let code = [
        instruction(op::MOV, 0, 0, 0, action),
        instruction(op::EXIT, 0, 0, 0, 0),
    ];
    object("classifier", EMPTY, &code.concat())
}

/// A program as an object file (ELF64, EM_BPF): a section with one function, a licence, and the
/// symbol that names the function.
fn object(section: &str, name: &str, program: &[u8]) -> Vec<u8> {
    const HEADER: usize = 64;
    const LICENSE: &[u8] = b"Dual MIT/GPL\0";
    let mut names = vec![0];
    let [section, license, symtab, strtab, function] =
        [section, "license", ".symtab", ".strtab", name].map(|name| {
            let at = names.len() as u32;
            names.extend(name.bytes().chain([0]));
            at
        });
    let mut symbols = vec![0; 24];
    symbols.extend(function.to_le_bytes());
    // Global function, default visibility, section 1.
    symbols.extend([0x12, 0, 1, 0]);
    symbols.extend(0_u64.to_le_bytes());
    symbols.extend((program.len() as u64).to_le_bytes());
    // name, type, flags, content, link, info, alignment, entry size
    type Section<'a> = (u32, u32, u64, &'a [u8], u32, u32, u64, u64);
    let sections: [Section<'_>; 4] = [
        (section, 1, 6, program, 0, 0, 8, 0),
        (license, 1, 3, LICENSE, 0, 0, 1, 0),
        (symtab, 2, 0, &symbols, 4, 1, 8, 24),
        (strtab, 3, 0, &names, 0, 0, 1, 0),
    ];
    let mut content = Vec::new();
    let mut table = vec![0; 64];
    for (name, kind, flags, bytes, link, info, alignment, entry) in sections {
        content.resize(content.len().next_multiple_of(8), 0);
        let offset = (HEADER + content.len()) as u64;
        table.extend(name.to_le_bytes());
        table.extend(kind.to_le_bytes());
        table.extend(flags.to_le_bytes());
        table.extend(0_u64.to_le_bytes());
        table.extend(offset.to_le_bytes());
        table.extend((bytes.len() as u64).to_le_bytes());
        table.extend(link.to_le_bytes());
        table.extend(info.to_le_bytes());
        table.extend(alignment.to_le_bytes());
        table.extend(entry.to_le_bytes());
        content.extend(bytes);
    }
    content.resize(content.len().next_multiple_of(8), 0);
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // Relocatable, EM_BPF, version 1, no entry, no program headers.
    file.extend([1, 0, 247, 0, 1, 0, 0, 0]);
    file.extend([0; 16]);
    file.extend(((HEADER + content.len()) as u64).to_le_bytes());
    file.extend([0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 64, 0, 5, 0, 4, 0]);
    file.extend(content);
    file.extend(table);
    file
}

/// Refuses mixes that the addresses and ports above have no room for.
pub fn check(mix: &Mix) -> anyhow::Result<()> {
    ensure!(mix.peers > 0 && mix.source_ports > 0, "no packets");
    ensure!(mix.peers * mix.stride <= 1 << 17, "too many peers");
    ensure!(
        mix.first_source + mix.source_ports <= 40_000,
        "too many source ports"
    );
    Ok(())
}
