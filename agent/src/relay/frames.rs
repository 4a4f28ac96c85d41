//! Frames out of a stream of bytes, without copying what they carry.

use bytes::{Buf, Bytes, BytesMut};
use proto::derp::{Frame, FrameError, HEADER_BYTES, Header, MAX_INFO_BYTES};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Read at once.
const READ_BYTES: usize = 64 << 10;

/// A whole frame whose body is not looked into yet.
pub(super) struct Raw {
    pub(super) kind: u8,
    pub(super) body: Bytes,
}

impl Raw {
    pub(super) fn decode(&self) -> Result<Frame<'_>, FrameError> {
        Frame::decode(self.kind, &self.body)
    }
}

/// What was read and is not used yet.
pub(super) struct Frames {
    buffer: BytesMut,
    longest: usize,
}

impl Frames {
    /// `buffer` was read already; no frame may be longer than `longest`.
    pub(super) fn new(buffer: BytesMut, longest: usize) -> Self {
        Self { buffer, longest }
    }

    /// From here on frames may be as long as the protocol lets them.
    pub(super) fn logged_in(&mut self) {
        self.longest = MAX_INFO_BYTES;
    }

    /// The next frame, if all of it is here.
    pub(super) fn next(&mut self) -> Result<Option<Raw>, FrameError> {
        let Some(header) = self.buffer.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let Header { kind, length } = Header::decode(*header)?;
        if length > self.longest {
            return Err(FrameError::TooLong { kind, length });
        }
        if self.buffer.len() < HEADER_BYTES + length {
            return Ok(None);
        }
        self.buffer.advance(HEADER_BYTES);
        let body = self.buffer.split_to(length).freeze();
        Ok(Some(Raw { kind, body }))
    }

    /// Reads more.
    pub(super) async fn read<R: AsyncRead + Unpin>(&mut self, from: &mut R) -> io::Result<()> {
        self.buffer.reserve(READ_BYTES);
        match from.read_buf(&mut self.buffer).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::key::NodeKey;

    #[tokio::test]
    async fn frames_come_whole_however_the_bytes_are_cut() {
        let packet = vec![9; 1_000];
        let sent = [
            Frame::Ping([1; 8]),
            Frame::RecvPacket {
                src: NodeKey([3; 32]),
                packet: &packet,
            },
            Frame::KeepAlive,
        ];
        let bytes: Vec<u8> = sent.iter().flat_map(Frame::to_vec).collect();
        for cut in [1, 3, 5, 700, bytes.len()] {
            let mut frames = Frames::new(BytesMut::new(), MAX_INFO_BYTES);
            let mut got = Vec::new();
            for mut piece in bytes.chunks(cut) {
                frames.read(&mut piece).await.unwrap();
                while let Some(raw) = frames.next().unwrap() {
                    got.extend_from_slice(&raw.decode().unwrap().to_vec());
                }
            }
            assert_eq!(got, bytes, "cut {cut}");
        }
        let mut short = Frames::new(BytesMut::new(), 10);
        short.read(&mut &bytes[13..]).await.unwrap();
        assert!(matches!(short.next(), Err(FrameError::TooLong { .. })));
    }
}
