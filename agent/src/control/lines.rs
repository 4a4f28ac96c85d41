//! Bytes into lines, with a bound on how long a line may grow.

use bytes::{Buf, BytesMut};

/// Collects bytes and gives out whole lines without their `\n`.
pub(super) struct LineBuffer {
    bytes: BytesMut,
    /// So many bytes at the front hold no `\n`: each byte is looked at once, however the line
    /// arrives.
    scanned: usize,
    limit: usize,
}

/// A line is longer than the limit.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLong;

impl LineBuffer {
    /// A buffer for lines of up to `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            bytes: BytesMut::new(),
            scanned: 0,
            limit,
        }
    }

    /// Adds what arrived.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole line, if it is there.
    pub(super) fn line(&mut self) -> Result<Option<BytesMut>, TooLong> {
        let new = self.bytes.get(self.scanned..).unwrap_or_default();
        let end = new.iter().position(|byte| *byte == b'\n');
        let length = end.map_or(self.bytes.len(), |end| self.scanned + end);
        if length > self.limit {
            return Err(TooLong);
        }
        if end.is_none() {
            self.scanned = length;
            return Ok(None);
        }
        let line = self.bytes.split_to(length);
        self.bytes.advance(1);
        self.scanned = 0;
        Ok(Some(line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(limit: usize, chunks: &[&str]) -> Result<Vec<String>, TooLong> {
        let mut buffer = LineBuffer::new(limit);
        let mut lines = Vec::new();
        for chunk in chunks {
            buffer.push(chunk.as_bytes());
            while let Some(line) = buffer.line()? {
                lines.push(String::from_utf8(line.to_vec()).unwrap());
            }
        }
        Ok(lines)
    }

    #[test]
    fn lines_come_out_whole_however_they_arrive() {
        let want = Ok(vec!["ab".to_owned(), String::new(), "c".to_owned()]);
        assert_eq!(lines(9, &["ab\n\nc\nrest"]), want);
        assert_eq!(lines(9, &["a", "b", "\n", "\n", "c", "\nre", "st"]), want);
    }

    #[test]
    fn a_line_over_the_limit_is_refused_before_its_end_arrives() {
        assert_eq!(lines(3, &["abc\n"]), Ok(vec!["abc".to_owned()]));
        assert_eq!(lines(3, &["abcd"]), Err(TooLong));
        assert_eq!(lines(3, &["ab", "cd\n"]), Err(TooLong));
    }
}
