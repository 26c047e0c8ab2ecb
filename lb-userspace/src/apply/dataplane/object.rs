//! Variants of the BPF objects: with or without the frags flag.
//!
//! aya takes the flag from the section's name ("xdp.frags"), which is fixed when the object is built. The programs are
//! therefore built with it, and a copy of the object with the name "xdp" is loaded without the flag.
//!
//! When the decision about frags changes, the new programs get program arrays of their own (pinned as `STAGES-next`),
//! because the running programs need theirs until the links have changed; then the pins are renamed.

use zerocopy::IntoBytes;

/// Names of the sections whose programs are loaded with the flag, and without it.
const WITH: &[u8] = b"xdp.frags\0";
const WITHOUT: &[u8] = b"xdp";
/// Name of the section with types and texts of debug information.
const BTF: &[u8] = b".BTF\0";

/// Field offsets of ELF64, little endian: in the header, and in each section header.
mod elf {
    pub const SECTIONS_AT: usize = 0x28;
    pub const SECTION_SIZE: usize = 0x3a;
    pub const SECTION_COUNT: usize = 0x3c;
    pub const NAMES_SECTION: usize = 0x3e;
    pub const NAME: usize = 0;
    pub const OFFSET: usize = 0x18;
    pub const SIZE: usize = 0x20;
}

/// Bytes of an object, aligned as the parser requires.
pub struct Object {
    words: Vec<u64>,
    len: usize,
}

impl Object {
    /// Returns the bytes of the object.
    pub fn bytes(&self) -> &[u8] {
        &self.words.as_bytes()[..self.len]
    }

    fn copy(object: &[u8]) -> Self {
        let mut words = vec![0u64; object.len().div_ceil(8)];
        words.as_mut_bytes()[..object.len()].copy_from_slice(object);
        Self { words, len: object.len() }
    }
}

/// Copies an object so that its XDP programs are loaded without the frags flag; none if it is not an object, or none of
/// its programs has the flag.
///
/// A section's name is an offset in a table of names, where names with the same ending may share it (".relxdp.frags" and
/// "xdp.frags"). The old name is therefore not overwritten: the sections get the offset of a new "xdp" that is appended
/// to the table.
pub fn without_frags(object: &[u8]) -> Option<Object> {
    let sections = sections(object)?;
    let names = sections.get(half(object, elf::NAMES_SECTION)?)?;
    let (table, len) = (names.offset, names.size);
    let name_of = |section: &Section| object.get(table..table + len)?.get(section.name..);
    let frags: Vec<usize> =
        sections.iter().filter(|s| name_of(s).is_some_and(|n| n.starts_with(WITH))).map(|s| s.at).collect();
    if frags.is_empty() {
        return None;
    }
    // The table moves to the end of the file, where it can grow.
    let mut bytes = object.to_vec();
    let moved = bytes.len();
    bytes.extend_from_slice(object.get(table..table + len)?);
    let place = u32::try_from(len).ok()?;
    bytes.extend_from_slice(WITHOUT);
    bytes.push(0);
    let grown = (bytes.len() - moved) as u64;
    put(&mut bytes, names.at + elf::OFFSET, &(moved as u64).to_le_bytes())?;
    put(&mut bytes, names.at + elf::SIZE, &grown.to_le_bytes())?;
    for at in frags {
        put(&mut bytes, at + elf::NAME, &place.to_le_bytes())?;
    }
    // Debug information names sections in its own table, whose texts are not shared.
    for section in sections.iter().filter(|s| name_of(s).is_some_and(|n| n.starts_with(BTF))) {
        cut_name(bytes.get_mut(section.offset..section.offset + section.size)?);
    }
    Some(Object::copy(&bytes))
}

/// Truncates the text "xdp.frags" to "xdp" in a section of debug information.
fn cut_name(btf: &mut [u8]) {
    let is_name = |window: &[u8]| window[0] == 0 && window[1..] == *WITH;
    if let Some(at) = btf.windows(WITH.len() + 1).position(is_name) {
        btf[at + 1 + WITHOUT.len()] = 0;
    }
}

/// A section: offset of its header, and fields of the header.
struct Section {
    at: usize,
    name: usize,
    offset: usize,
    size: usize,
}

fn sections(object: &[u8]) -> Option<Vec<Section>> {
    // ELF, 64 bits, little endian.
    if object.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (first, size) = (long(object, elf::SECTIONS_AT)?, half(object, elf::SECTION_SIZE)?);
    let section = |i: usize| {
        let at = first.checked_add(i.checked_mul(size)?)?;
        let name = object.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)? as usize;
        Some(Section {
            at,
            name,
            offset: long(object, at + elf::OFFSET)?,
            size: long(object, at + elf::SIZE)?,
        })
    };
    (0..half(object, elf::SECTION_COUNT)?).map(section).collect()
}

fn half(object: &[u8], at: usize) -> Option<usize> {
    object.get(at..at + 2)?.try_into().ok().map(|b| usize::from(u16::from_le_bytes(b)))
}

fn long(object: &[u8], at: usize) -> Option<usize> {
    object.get(at..at + 8)?.try_into().ok().and_then(|b| usize::try_from(u64::from_le_bytes(b)).ok())
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) -> Option<()> {
    bytes.get_mut(at..at + value.len())?.copy_from_slice(value);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(object: &[u8]) -> Vec<String> {
        let sections = sections(object).expect("an ELF object");
        let table = &sections[half(object, elf::NAMES_SECTION).expect("a header")];
        let text = |s: &Section| {
            let rest = &object[table.offset..table.offset + table.size][s.name..];
            let end = rest.iter().position(|b| *b == 0).expect("names end with a zero");
            String::from_utf8(rest[..end].to_vec()).expect("text")
        };
        sections.iter().map(text).collect()
    }

    #[test]
    fn only_the_programs_sections_get_another_name() {
        for object in [crate::apply::objects::INGRESS, crate::apply::objects::DECAP] {
            if object.is_empty() {
                // Built without programs.
                continue;
            }
            let before = names(object);
            assert!(before.iter().any(|n| n == "xdp.frags"), "{before:?}");
            let plain = without_frags(object).expect("its programs have the flag");
            let after = names(plain.bytes());
            let expected: Vec<String> =
                before.iter().map(|n| if n == "xdp.frags" { "xdp".to_owned() } else { n.clone() }).collect();
            assert_eq!(after, expected);
            assert!(without_frags(plain.bytes()).is_none(), "nothing is left to change");
            let named = |bytes: &[u8]| bytes.windows(11).any(|w| w == b"\0xdp.frags\0");
            let btf = |bytes: &[u8]| {
                let sections = sections(bytes).expect("an ELF object");
                let at = names(bytes).iter().position(|n| n == ".BTF").expect("it has debug information");
                bytes[sections[at].offset..][..sections[at].size].to_vec()
            };
            assert!(
                named(&btf(object)) && !named(&btf(plain.bytes())),
                "debug information names the section"
            );
            assert_eq!(plain.bytes().as_ptr().align_offset(8), 0);
        }
    }

    #[test]
    fn other_bytes_are_left_alone() {
        assert!(without_frags(b"").is_none());
        assert!(without_frags(b"\x7fELF\x02\x01").is_none());
        assert!(without_frags(&[0xff; 200]).is_none());
        let mut cut = crate::apply::objects::DECAP.to_vec();
        cut.truncate(cut.len() / 2);
        assert!(without_frags(&cut).is_none());
    }
}
