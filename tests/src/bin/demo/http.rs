//! A file over HTTP/1.1, in as few lines as can be: enough to move 100 MB and compare checksums.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ring::digest::{Context as Hash, SHA256, digest};
use tests::host::Host;

/// How long the whole transfer may stand still.
const STALL_BOUND: Duration = Duration::from_secs(30);

/// What arrived.
pub struct Download {
    /// SHA-256 of the body, in hexadecimal.
    pub sha256: String,
    /// How long the transfer took.
    pub time: Duration,
}

/// Serves one request with `body` on a thread of its own.
pub fn serve_once(listener: TcpListener, body: Vec<u8>) {
    std::thread::spawn(move || -> anyhow::Result<()> {
        let (stream, _) = listener.accept()?;
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        while lines
            .next()
            .transpose()?
            .is_some_and(|line| !line.is_empty())
        {}
        let mut stream = stream;
        let length = body.len();
        write!(
            stream,
            "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
        )?;
        stream.write_all(&body)?;
        Ok(())
    });
}

/// Fetches `/` from a server and hashes what comes.
pub fn fetch(from: &Host, server: SocketAddr) -> anyhow::Result<Download> {
    let begun = Instant::now();
    let mut stream = from.enter(|| TcpStream::connect_timeout(&server, STALL_BOUND))?;
    stream.set_read_timeout(Some(STALL_BOUND))?;
    write!(stream, "GET / HTTP/1.1\r\nhost: {server}\r\n\r\n")?;
    let mut reader = BufReader::with_capacity(1 << 17, stream);
    let mut head = String::new();
    while reader.read_line(&mut head)? > 2 {}
    ensure!(
        head.starts_with("HTTP/1.1 200"),
        "the server answered {head}"
    );
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let mut left: usize = length.context("no content-length")?.parse()?;
    let (mut hash, mut buffer) = (Hash::new(&SHA256), vec![0; 1 << 17]);
    while left > 0 {
        let count = reader.read(&mut buffer)?;
        ensure!(count > 0, "{left} bytes are missing");
        hash.update(&buffer[..count]);
        left -= count;
    }
    Ok(Download {
        sha256: hex(hash.finish().as_ref()),
        time: begun.elapsed(),
    })
}

/// SHA-256 of some bytes, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes that no compression and no repetition helps with (a linear congruential generator).
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        bytes.extend((state >> 11).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
