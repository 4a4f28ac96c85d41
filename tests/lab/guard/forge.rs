//! Handshake initiations that whoever knows a node's public key can forge: right in all but their
//! secrets, so that WireGuard takes them for true until it has agreed on a key.
//!
//! `mac1` is BLAKE2s of the message under a key made of the receiver's public key (the WireGuard
//! paper, 5.4.4; `cookie_init` in drivers/net/wireguard/cookie.c). BLAKE2s is RFC 7693.

/// Length of an initiation.
pub const BYTES: usize = 148;
/// Where `mac1` is, behind all that it covers.
const MAC1: usize = 116;
const MAC_BYTES: usize = 16;
const LABEL: &[u8; 8] = b"mac1----";

/// An initiation to the node with this public key; another for each number.
pub fn initiation(receiver: &[u8; 32], number: u64) -> [u8; BYTES] {
    let mut message = [0; BYTES];
    // The ephemeral key, which any 32 bytes are; the rest is what only secrets make right.
    for (at, byte) in message[..MAC1].iter_mut().enumerate() {
        *byte = (number >> (8 * (at % 8))) as u8 ^ (at as u8).wrapping_mul(37);
    }
    message[..4].copy_from_slice(&[1, 0, 0, 0]);
    let key = blake2s(32, &[], &[LABEL.as_slice(), receiver].concat());
    let mac = blake2s(MAC_BYTES, &key, &message[..MAC1]);
    message[MAC1..MAC1 + MAC_BYTES].copy_from_slice(&mac[..MAC_BYTES]);
    message
}

const BLOCK: usize = 64;
const IV: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];
/// In which order each round takes the words of a block (RFC 7693 2.7).
const SIGMA: [[usize; 16]; 10] = [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
    [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
    [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
    [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
    [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
    [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
    [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
    [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
    [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
];
/// Columns, then diagonals.
const LANES: [[usize; 4]; 8] = [
    [0, 4, 8, 12],
    [1, 5, 9, 13],
    [2, 6, 10, 14],
    [3, 7, 11, 15],
    [0, 5, 10, 15],
    [1, 6, 11, 12],
    [2, 7, 8, 13],
    [3, 4, 9, 14],
];

fn blake2s(bytes: usize, key: &[u8], data: &[u8]) -> Vec<u8> {
    let mut padded = key.to_vec();
    if !key.is_empty() {
        padded.resize(BLOCK, 0);
    }
    padded.extend(data);
    let length = padded.len();
    padded.resize(length.next_multiple_of(BLOCK).max(BLOCK), 0);
    let mut state = IV;
    state[0] ^= 0x0101_0000 ^ ((key.len() as u32) << 8) ^ bytes as u32;
    let blocks = padded.len() / BLOCK;
    for (number, block) in padded.chunks_exact(BLOCK).enumerate() {
        let last = number + 1 == blocks;
        let counted = if last { length } else { (number + 1) * BLOCK };
        compress(&mut state, block, counted as u32, last);
    }
    let words = state.iter().flat_map(|word| word.to_le_bytes());
    words.take(bytes).collect()
}

fn compress(state: &mut [u32; 8], block: &[u8], counted: u32, last: bool) {
    let word = |at: usize| {
        let bytes = [0, 1, 2, 3].map(|byte| block[4 * at + byte]);
        u32::from_le_bytes(bytes)
    };
    let mut v = [0; 16];
    v[..8].copy_from_slice(state);
    v[8..].copy_from_slice(&IV);
    v[12] ^= counted;
    if last {
        v[14] = !v[14];
    }
    for order in SIGMA {
        for ([a, b, c, d], pair) in LANES.into_iter().zip(order.chunks_exact(2)) {
            for (at, [turn_d, turn_b]) in pair.iter().zip([[16, 12], [8, 7]]) {
                v[a] = v[a].wrapping_add(v[b]).wrapping_add(word(*at));
                v[d] = (v[d] ^ v[a]).rotate_right(turn_d);
                v[c] = v[c].wrapping_add(v[d]);
                v[b] = (v[b] ^ v[c]).rotate_right(turn_b);
            }
        }
    }
    for (at, word) in state.iter_mut().enumerate() {
        *word ^= v[at] ^ v[at + 8];
    }
}

#[test]
fn forged_macs_are_those_of_the_rfc() {
    // RFC 7693, appendix B.
    let abc: String = blake2s(32, &[], b"abc")
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let known = "508c5e8c327c14e2e1a72ba34eeb452f37458b209ed63a294d999b4c86675982";
    assert_eq!(abc, known);
}
