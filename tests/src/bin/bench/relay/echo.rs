//! The limit that the relay is held against: a process that receives a datagram and sends it on, and
//! does nothing else.
//!
//! A socket and a thread for each pair. A datagram shorter than any packet says where the others
//! are to go, and is sent back; it is this program itself, started once more.

use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use tests::process::Process;

use super::{READY, STAMP_BYTES};

/// A datagram on the loopback device that has not come by then never will.
const LOST: Duration = Duration::from_secs(5);

/// Arguments of the echo's own process.
#[derive(clap::Args)]
pub struct Args {
    /// Sockets, one for each pair
    #[arg(long)]
    sockets: usize,
}

/// A running echo.
pub struct Echo {
    /// Its process.
    pub process: Process,
    doors: Vec<SocketAddr>,
}

/// The echo's own process: never returns unless a socket breaks.
pub fn serve(args: &Args) -> anyhow::Result<()> {
    let sockets = (0..args.sockets).map(|_| UdpSocket::bind("127.0.0.1:0"));
    let sockets: Vec<UdpSocket> = sockets.collect::<Result<_, _>>()?;
    let ports = sockets.iter().map(|socket| socket.local_addr());
    let ports: Vec<String> = ports
        .map(|addr| addr.map(|addr| addr.to_string()))
        .collect::<Result<_, _>>()?;
    let threads: Vec<_> = sockets
        .into_iter()
        .map(|socket| thread::spawn(move || forward(&socket)))
        .collect();
    println!("echo on {};", ports.join(" "));
    for thread in threads {
        match thread.join() {
            Ok(ended) => ended?,
            Err(_) => bail!("a thread of the echo died"),
        }
    }
    Ok(())
}

fn forward(socket: &UdpSocket) -> std::io::Result<()> {
    let mut packet = vec![0; 1 << 16];
    let mut to = None;
    loop {
        let (length, from) = socket.recv_from(&mut packet)?;
        if length < STAMP_BYTES {
            to = Some(from);
        }
        let bytes = packet.get(..length).unwrap_or_default();
        if let Some(to) = to {
            // Who listened last may be gone: the next one says where it is.
            let _ = socket.send_to(bytes, to);
        }
    }
}

impl Echo {
    /// Starts one with `sockets` sockets.
    pub fn start(sockets: usize, log: &std::path::Path) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["udp-echo", "--sockets", &sockets.to_string()]);
        let process = Process::start("echo", &mut command, log)?;
        let told = || {
            let said = process.said();
            let rest = said.split("echo on ").nth(1)?;
            let (doors, _) = rest.split_once(';')?;
            doors
                .split(' ')
                .map(|door| door.parse().ok())
                .collect::<Option<Vec<SocketAddr>>>()
        };
        tests::wait_until("the echo listens", READY, || told().is_some())?;
        let doors = told().context("the echo does not say where it listens")?;
        Ok(Self { process, doors })
    }

    /// One who sends by the socket of this number, and one who receives.
    pub fn pair(&self, number: usize) -> anyhow::Result<(UdpSocket, UdpSocket)> {
        let door = self.doors.get(number).context("no such socket")?;
        let socket = || -> std::io::Result<UdpSocket> {
            let socket = UdpSocket::bind("127.0.0.1:0")?;
            socket.connect(door)?;
            socket.set_read_timeout(Some(LOST))?;
            Ok(socket)
        };
        let (sender, receiver) = (socket()?, socket()?);
        receiver.send(b"me")?;
        let mut answer = [0; STAMP_BYTES];
        while receiver.recv(&mut answer)? != 2 {}
        Ok((sender, receiver))
    }
}
