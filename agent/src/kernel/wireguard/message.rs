//! Netlink messages as bytes: a generic netlink request is written, an answer is walked over.
//!
//! ```text
//!  0       4      6       8       12      16   17       18        20
//!  ├ length ┼ type ┼ flags ┼ sequence ┼ port ┼ cmd ┼ version ┼ reserved ┤ attributes …
//!                                                    attribute: length u16 │ type u16 │ value, to 4
//! ```
//! Numbers are in host order (include/uapi/linux/netlink.h). Requests may hold a private key, and
//! are wiped when dropped.

use zeroize::Zeroizing;

/// `struct nlmsghdr`, then `struct genlmsghdr`.
pub(super) const HEADER_BYTES: usize = NETLINK_BYTES + 4;
const NETLINK_BYTES: usize = 16;
const ATTRIBUTE_BYTES: usize = 4;
/// `NLM_F_REQUEST`, `NLM_F_ACK`, `NLM_F_DUMP`, `NLM_F_DUMP_INTR`.
const REQUEST: u16 = 1;
pub(super) const ACK: u16 = 4;
pub(super) const DUMP: u16 = 0x300;
const INTERRUPTED: u16 = 0x10;
/// `NLMSG_ERROR` (an acknowledgement, if the error is 0) and `NLMSG_DONE`.
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `NLA_F_NESTED`, and the bits of a type that are the type.
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
/// Version of WireGuard's and of the control family.
const VERSION: u8 = 1;

/// A request in the making.
pub(super) struct Message {
    bytes: Zeroizing<Vec<u8>>,
}

/// A nested attribute that is open.
#[must_use]
pub(super) struct Nest(usize);

impl Message {
    pub(super) fn new(family: u16, flags: u16, sequence: u32, command: u8) -> Self {
        // Room enough never to grow: growing would leave a copy behind that nobody wipes.
        let mut bytes = Zeroizing::new(Vec::with_capacity(1 << 17));
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(family.to_ne_bytes());
        bytes.extend((flags | REQUEST).to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend([command, VERSION, 0, 0]);
        Self { bytes }
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Adds an attribute.
    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) {
        let nest = self.open(kind);
        self.bytes.extend_from_slice(value);
        self.end(nest);
    }

    /// Opens a nested attribute.
    pub(super) fn begin(&mut self, kind: u16) -> Nest {
        self.open(kind | NESTED)
    }

    fn open(&mut self, kind: u16) -> Nest {
        let start = self.bytes.len();
        self.bytes.extend(0u16.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        Nest(start)
    }

    /// Closes the attribute that was opened last.
    pub(super) fn end(&mut self, nest: Nest) {
        let length = self.bytes.len() - nest.0;
        assert!(
            length <= usize::from(u16::MAX),
            "an attribute of {length} bytes does not fit"
        );
        self.bytes[nest.0..nest.0 + 2].copy_from_slice(&(length as u16).to_ne_bytes());
        let padded = self.bytes.len().next_multiple_of(ATTRIBUTE_BYTES);
        self.bytes.resize(padded, 0);
    }

    /// The message as it goes to the kernel.
    pub(super) fn finish(mut self) -> Zeroizing<Vec<u8>> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes
    }
}

/// One message of an answer.
pub(super) struct Answer<'a> {
    /// What was dumped changed meanwhile.
    pub(super) interrupted: bool,
    pub(super) content: Content<'a>,
}

/// What it holds.
pub(super) enum Content<'a> {
    /// A part of what was asked for.
    Part(Attributes<'a>),
    /// The end; 0 if all went well, else an errno.
    Done(i32),
}

/// The messages in `bytes` that answer the request of this `sequence` number.
pub(super) fn answers(bytes: &[u8], sequence: u32) -> impl Iterator<Item = Answer<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        loop {
            let length = u32::from_ne_bytes(rest.get(..4)?.try_into().ok()?) as usize;
            let message = rest.get(..length).filter(|_| length >= NETLINK_BYTES)?;
            rest = rest
                .get(length.next_multiple_of(ATTRIBUTE_BYTES)..)
                .unwrap_or_default();
            if let Some((number, answer)) = answer(message)
                && number == sequence
            {
                return Some(answer);
            }
        }
    })
}

fn answer(message: &[u8]) -> Option<(u32, Answer<'_>)> {
    let short = |at: usize| {
        Some(u16::from_ne_bytes(
            message.get(at..at + 2)?.try_into().ok()?,
        ))
    };
    let (kind, flags) = (short(4)?, short(6)?);
    let sequence = u32::from_ne_bytes(message.get(8..12)?.try_into().ok()?);
    let content = if kind == ERROR || kind == DONE {
        let errno = message.get(NETLINK_BYTES..NETLINK_BYTES + 4)?;
        Content::Done(-i32::from_ne_bytes(errno.try_into().ok()?))
    } else {
        Content::Part(Attributes::new(message.get(HEADER_BYTES..)?))
    };
    let interrupted = flags & INTERRUPTED != 0;
    Some((
        sequence,
        Answer {
            interrupted,
            content,
        },
    ))
}

/// Attributes one after the other, as type and value. Ends at the first that is cut short.
#[derive(Clone)]
pub(super) struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Attributes<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = u16::from_ne_bytes(self.rest.get(..2)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(self.rest.get(2..4)?.try_into().ok()?) & TYPE_MASK;
        let value = self.rest.get(ATTRIBUTE_BYTES..length)?;
        self.rest = self
            .rest
            .get(length.next_multiple_of(ATTRIBUTE_BYTES)..)
            .unwrap_or_default();
        Some((kind, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut message = Message::new(7, ACK, 42, 1);
        message.bytes(3, b"abc");
        let nest = message.begin(8);
        message.bytes(1, &[9; 4]);
        message.end(nest);
        let bytes = message.finish();
        assert_eq!(bytes.len() % 4, 0);
        let answer = answers(&bytes, 42).next().unwrap();
        let Content::Part(attributes) = answer.content else {
            panic!("a request is no end");
        };
        let all: Vec<_> = attributes.collect();
        assert_eq!(all[0], (3, &b"abc"[..]));
        let inner: Vec<_> = Attributes::new(all[1].1).collect();
        assert_eq!(inner, [(1, &[9; 4][..])]);
        assert!(answers(&bytes, 41).next().is_none());
    }

    #[test]
    fn truncated_answers_end_the_walk() {
        let mut message = Message::new(7, ACK, 42, 1);
        message.bytes(3, &[1; 60]);
        let bytes = message.finish();
        for end in 0..bytes.len() {
            assert_eq!(answers(&bytes[..end], 42).count(), 0, "{end}");
        }
    }
}
