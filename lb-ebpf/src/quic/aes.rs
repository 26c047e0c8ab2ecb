//! AES-128 on single blocks (FIPS 197), for connection ids.
//!
//! Connection ids are no secrets in themselves and every packet shows one, so tables are good enough here: what
//! a cache could tell, a co-tenant of the ingress host's kernel would have to watch. The tables are computed
//! when this is compiled. Words are big-endian numbers, as the standard's columns are.

/// Product in GF(2^8).
const fn times(mut a: u8, mut b: u8) -> u8 {
    let mut product = 0;
    while b != 0 {
        if b & 1 != 0 {
            product ^= a;
        }
        a = a << 1 ^ if a & 0x80 != 0 { 0x1b } else { 0 };
        b >>= 1;
    }
    product
}

const fn make_sbox() -> [u8; 256] {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        // The inverse, by Fermat: x^254.
        let (x, mut inverse, mut n) = (i as u8, 1, 0);
        while n < 254 {
            inverse = times(inverse, x);
            n += 1;
        }
        if x == 0 {
            inverse = 0;
        }
        table[i] = inverse
            ^ inverse.rotate_left(1)
            ^ inverse.rotate_left(2)
            ^ inverse.rotate_left(3)
            ^ inverse.rotate_left(4)
            ^ 0x63;
        i += 1;
    }
    table
}

const fn make_inverse(sbox: &[u8; 256]) -> [u8; 256] {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        table[sbox[i] as usize] = i as u8;
        i += 1;
    }
    table
}

/// A substitution and the column that it becomes.
const fn make_columns(sbox: &[u8; 256], factors: [u8; 4]) -> [u32; 256] {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let s = sbox[i];
        table[i] = u32::from_be_bytes([
            times(s, factors[0]),
            times(s, factors[1]),
            times(s, factors[2]),
            times(s, factors[3]),
        ]);
        i += 1;
    }
    table
}

static SBOX: [u8; 256] = make_sbox();
static INVERSE: [u8; 256] = make_inverse(&make_sbox());
static FORWARD: [u32; 256] = make_columns(&make_sbox(), [2, 1, 1, 3]);
static BACKWARD: [u32; 256] = make_columns(&make_inverse(&make_sbox()), [14, 9, 13, 11]);
/// InvMixColumns of a byte in the first row.
static UNMIX: [u32; 256] = make_unmix();

const fn make_unmix() -> [u32; 256] {
    let mut identity = [0; 256];
    let mut i = 0;
    while i < 256 {
        identity[i] = i as u8;
        i += 1;
    }
    make_columns(&identity, [14, 9, 13, 11])
}

#[inline(always)]
fn byte(word: u32, row: u32) -> usize {
    (word >> (24 - 8 * row) & 0xff) as usize
}

#[inline(always)]
fn column(table: &[u32; 256], a: u32, b: u32, c: u32, d: u32) -> u32 {
    table[byte(a, 0)]
        ^ table[byte(b, 1)].rotate_right(8)
        ^ table[byte(c, 2)].rotate_right(16)
        ^ table[byte(d, 3)].rotate_right(24)
}

#[inline(always)]
fn last(table: &[u8; 256], a: u32, b: u32, c: u32, d: u32) -> u32 {
    (table[byte(a, 0)] as u32) << 24
        | (table[byte(b, 1)] as u32) << 16
        | (table[byte(c, 2)] as u32) << 8
        | table[byte(d, 3)] as u32
}

/// Round keys of a key.
pub fn expand(key: [u8; 16]) -> [u32; 44] {
    let mut words = [0; 44];
    for i in 0..4 {
        words[i] = u32::from_be_bytes([key[i * 4], key[i * 4 + 1], key[i * 4 + 2], key[i * 4 + 3]]);
    }
    let mut constant = 1;
    for i in 4..44 {
        let mut word = words[i - 1];
        if i % 4 == 0 {
            let w = word.rotate_left(8);
            word = last(&SBOX, w, w, w, w) ^ (constant as u32) << 24;
            constant = times(constant, 2);
        }
        words[i] = words[i - 4] ^ word;
    }
    words
}

/// Encrypts a block.
#[inline(always)]
pub fn encrypt(keys: &[u32; 44], block: &mut [u32; 4]) {
    for i in 0..4 {
        block[i] ^= keys[i];
    }
    for round in 1..10 {
        let [a, b, c, d] = *block;
        let k = bounded(round * 4);
        block[0] = column(&FORWARD, a, b, c, d) ^ keys[k];
        block[1] = column(&FORWARD, b, c, d, a) ^ keys[k + 1];
        block[2] = column(&FORWARD, c, d, a, b) ^ keys[k + 2];
        block[3] = column(&FORWARD, d, a, b, c) ^ keys[k + 3];
    }
    let [a, b, c, d] = *block;
    block[0] = last(&SBOX, a, b, c, d) ^ keys[40];
    block[1] = last(&SBOX, b, c, d, a) ^ keys[41];
    block[2] = last(&SBOX, c, d, a, b) ^ keys[42];
    block[3] = last(&SBOX, d, a, b, c) ^ keys[43];
}

/// Decrypts a block, by the equivalent inverse cipher (FIPS 197 5.3.5) on the encryption's keys.
#[inline(always)]
pub fn decrypt(keys: &[u32; 44], block: &mut [u32; 4]) {
    for i in 0..4 {
        block[i] ^= keys[40 + i];
    }
    for round in 1..10 {
        let [a, b, c, d] = *block;
        let k = bounded(40 - round * 4);
        block[0] = column(&BACKWARD, a, d, c, b) ^ unmixed(keys[k]);
        block[1] = column(&BACKWARD, b, a, d, c) ^ unmixed(keys[k + 1]);
        block[2] = column(&BACKWARD, c, b, a, d) ^ unmixed(keys[k + 2]);
        block[3] = column(&BACKWARD, d, c, b, a) ^ unmixed(keys[k + 3]);
    }
    let [a, b, c, d] = *block;
    block[0] = last(&INVERSE, a, d, c, b) ^ keys[0];
    block[1] = last(&INVERSE, b, a, d, c) ^ keys[1];
    block[2] = last(&INVERSE, c, b, a, d) ^ keys[2];
    block[3] = last(&INVERSE, d, c, b, a) ^ keys[3];
}

/// Index of a round's first key, with a bound that the verifier sees: LLVM makes a pointer of it that moves from round to
/// round, of which 7.2 forgets how far.
#[inline(always)]
fn bounded(k: usize) -> usize {
    core::hint::black_box(k).min(40)
}

/// A round key for the inverse cipher.
#[inline(always)]
fn unmixed(key: u32) -> u32 {
    column(&UNMIX, key, key, key, key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(text: &str) -> [u32; 4] {
        std::array::from_fn(|i| u32::from_str_radix(&text[i * 8..i * 8 + 8], 16).unwrap())
    }

    fn key(text: &str) -> [u32; 44] {
        expand(std::array::from_fn(|i| u8::from_str_radix(&text[i * 2..i * 2 + 2], 16).unwrap()))
    }

    /// FIPS 197, appendices A.1, B and C.1.
    #[test]
    fn the_standards_examples() {
        assert_eq!(key("2b7e151628aed2a6abf7158809cf4f3c")[40..], block("d014f9a8c9ee2589e13f0cc8b6630ca6"));
        for (k, plain, cipher) in [
            (
                "2b7e151628aed2a6abf7158809cf4f3c",
                "3243f6a8885a308d313198a2e0370734",
                "3925841d02dc09fbdc118597196a0b32",
            ),
            (
                "000102030405060708090a0b0c0d0e0f",
                "00112233445566778899aabbccddeeff",
                "69c4e0d86a7b0430d8cdb78070b4c55a",
            ),
        ] {
            let mut b = block(plain);
            encrypt(&key(k), &mut b);
            assert_eq!(b, block(cipher));
            decrypt(&key(k), &mut b);
            assert_eq!(b, block(plain));
        }
    }
}
