//! SCTP's checksum is a CRC32c over the whole packet. A CRC is linear: what a changed word near the front
//! does to it follows from the word and the number of bytes after it, without reading those.
//!
//! Bits are multiplied with, never branched on: the verifier would follow every branch of every round.

const POLYNOMIAL: u32 = 0x82f6_3b78;
/// x to the power of 0, with the lowest power in the highest bit.
const ONE: u32 = 1 << 31;

/// A bit of which the compiler does not know that it is one: it would make a branch of it.
#[inline(always)]
fn bit(value: u32) -> u32 {
    let mut bit = value & 1;
    let bit = &raw mut bit;
    // SAFETY: a variable of this function.
    unsafe { bit.read_volatile() }
}

/// a times b, modulo the polynomial.
#[inline(always)]
fn times(mut a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    for _ in 0..32 {
        product ^= b.wrapping_mul(bit(a >> 31));
        a <<= 1;
        b = b >> 1 ^ POLYNOMIAL.wrapping_mul(bit(b));
    }
    product
}

/// What the CRC of a message is to be XORed with (as a number) when a word with `after` bytes after it is
/// XORed with `word`, which is in the order of the packet's bytes.
///
/// A global function: the verifier looks at it once, and not on every way that leads here.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn changed_word(word: u32, after: u32) -> u32 {
    let mut crc = u32::from_le(word);
    for _ in 0..32 {
        crc = crc >> 1 ^ POLYNOMIAL.wrapping_mul(bit(crc));
    }
    // Each byte after it multiplies by x^8; x^(8 * 2^k) by squaring.
    let mut power = ONE >> 8;
    for k in 0..16 {
        let take = bit(after >> k);
        let factor = power.wrapping_mul(take) | ONE.wrapping_mul(1 - take);
        crc = times(factor, crc);
        power = times(power, power);
    }
    crc
}
