//! Layouts of the map types of any ABI version, and the conversion of entries from one to another.
//!
//! Each home has a map [`names::LAYOUT`] with a [`Layout`] as JSON. A reader finds maps, records and fields by name
//! ([`lb_common::describe`]), so it reads versions that were made before it, and after it. Version 2 had no such
//! map; its layout is embedded here.
//!
//! A field that the reader has and the other version lacks is zero where that is sound
//! ([`lb_common::describe::MAY_LACK`]); otherwise the flows of that map count as lost.

use super::{DataplaneError, pins::Home, sys};
use aya::{Ebpf, maps::Array};
use lb_common::{ABI_VERSION, describe, names};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The map types of a version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// ABI version.
    pub abi: u32,
    records: BTreeMap<String, RecordLayout>,
    /// Records of keys and values.
    maps: BTreeMap<String, (String, String)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct RecordLayout {
    size: usize,
    fields: BTreeMap<String, FieldLayout>,
}

/// Offset and size in bytes, and the record that the field is or is an array of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FieldLayout(usize, usize, Option<String>);

/// Maximum size of records in bytes, and maximum nesting.
const MAX_RECORD: usize = 1_024;
const MAX_DEPTH: usize = 4;

impl Layout {
    /// Layout of this version.
    pub fn ours() -> Self {
        let field =
            |f: &describe::Field| (f.name.to_owned(), FieldLayout(f.offset, f.size, f.of.map(str::to_owned)));
        let record = |r: &describe::Record| {
            (r.name.to_owned(), RecordLayout { size: r.size, fields: r.fields.iter().map(field).collect() })
        };
        let map = |m: &describe::MapOf| (m.name.to_owned(), (m.key.to_owned(), m.value.to_owned()));
        Self {
            abi: ABI_VERSION,
            records: describe::RECORDS.iter().map(record).collect(),
            maps: describe::MAPS.iter().map(map).collect(),
        }
    }

    /// Reads the layout of another version's maps; an error says what is wrong.
    pub fn read(home: &Home) -> Result<Self, String> {
        let path = home.path.join(names::LAYOUT);
        if !path.exists() {
            if home.abi == 2 {
                return Ok(serde_json::from_str(include_str!("abi2.json")).expect("a test parses it"));
            }
            return Err("they have no description of their entries".to_owned());
        }
        let wrong = |what: String| format!("the description of their entries cannot be read ({what})");
        let mut text = vec![0; names::LAYOUT_LEN];
        let map = sys::open(&path).map_err(|e| wrong(e.to_string()))?;
        let has = sys::lookup(&map, &0u32.to_ne_bytes(), &mut text).map_err(|e| wrong(e.to_string()))?;
        if !has {
            return Err(wrong("it is empty".to_owned()));
        }
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let layout: Self = serde_json::from_slice(text).map_err(|e| wrong(e.to_string()))?;
        layout.check().map_err(wrong)?;
        Ok(layout)
    }

    /// Checks that every field lies within its record.
    fn check(&self) -> Result<(), String> {
        for (name, record) in &self.records {
            let fits = |FieldLayout(offset, size, _): &FieldLayout| {
                offset.checked_add(*size).is_some_and(|end| end <= record.size)
            };
            if record.size > MAX_RECORD || !record.fields.values().all(fits) {
                return Err(format!("record {name} is too long, or has a field beyond its end"));
            }
        }
        Ok(())
    }

    fn record(&self, name: &str) -> Result<&RecordLayout, String> {
        self.records.get(name).ok_or_else(|| format!("record {name} is not described"))
    }

    /// Offset of a field in the values of a map; an error if it does not have this size.
    pub fn value_field(&self, map: &str, field: &str, size: usize) -> Result<usize, String> {
        let (_, value) = self.maps.get(map).ok_or_else(|| format!("map {map} is not described"))?;
        match self.record(value)?.fields.get(field) {
            Some(FieldLayout(offset, found, None)) if *found == size => Ok(*offset),
            Some(_) => Err(format!("{value}.{field} has another type")),
            None => Err(format!("{value} has no field {field}")),
        }
    }

    /// Sizes of a map's keys and values.
    pub fn sizes(&self, map: &str) -> Result<(usize, usize), String> {
        let (key, value) = self.maps.get(map).ok_or_else(|| format!("map {map} is not described"))?;
        Ok((self.record(key)?.size, self.record(value)?.size))
    }
}

/// Writes the layout of this version.
pub fn write_own(bpf: &mut Ebpf) -> Result<(), DataplaneError> {
    let text = serde_json::to_vec(&Layout::ours()).expect("maps of plain data");
    let mut entry = [0; names::LAYOUT_LEN];
    entry[..text.len()].copy_from_slice(&text);
    let map = |source| DataplaneError::Map { map: names::LAYOUT, source };
    let data = bpf.map_mut(names::LAYOUT).expect("the object was built with this map");
    let mut layout: Array<_, [u8; names::LAYOUT_LEN]> = Array::try_from(data).map_err(map)?;
    layout.set(0, entry, 0).map_err(map)
}

/// Conversion of a record between versions: ranges to copy into zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Copies {
    from_size: usize,
    to_size: usize,
    /// Source offset, destination offset, length.
    ranges: Vec<(usize, usize, usize)>,
}

impl Copies {
    fn new(from: (&Layout, &str), to: (&Layout, &str)) -> Result<Self, String> {
        let mut copies = Self {
            from_size: from.0.record(from.1)?.size,
            to_size: to.0.record(to.1)?.size,
            ranges: Vec::new(),
        };
        copies.add((from.0, from.1, 0), (to.0, to.1, 0), 0)?;
        Ok(copies)
    }

    fn add(
        &mut self,
        (from, from_name, from_base): (&Layout, &str, usize),
        (to, to_name, to_base): (&Layout, &str, usize),
        depth: usize,
    ) -> Result<(), String> {
        if depth > MAX_DEPTH {
            return Err(format!("record {from_name} is nested too deep"));
        }
        let (old, new) = (from.record(from_name)?, to.record(to_name)?);
        for (name, FieldLayout(to_offset, to_size, to_of)) in &new.fields {
            let Some(FieldLayout(from_offset, from_size, from_of)) = old.fields.get(name) else {
                if describe::OPTIONAL_FIELDS.contains(&(to_name, name)) {
                    continue;
                }
                return Err(format!("{from_name} has no field {name}"));
            };
            let (from_at, to_at) = (from_base + from_offset, to_base + to_offset);
            match (from_of, to_of) {
                (None, None) if from_size == to_size => self.ranges.push((from_at, to_at, *to_size)),
                (Some(from_of), Some(to_of)) => {
                    let (a, b) = (from.record(from_of)?.size.max(1), to.record(to_of)?.size.max(1));
                    if from_size / a > to_size / b {
                        return Err(format!("{from_name}.{name} has more elements than fit"));
                    }
                    for i in 0..from_size / a {
                        self.add((from, from_of, from_at + i * a), (to, to_of, to_at + i * b), depth + 1)?;
                    }
                }
                _ => return Err(format!("{from_name}.{name} has another type")),
            }
        }
        Ok(())
    }

    fn apply(&self, from: &[u8], to: &mut [u8]) {
        for &(from_at, to_at, len) in &self.ranges {
            to[to_at..to_at + len].copy_from_slice(&from[from_at..from_at + len]);
        }
    }
}

/// Conversion of the entries of a map between versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversion {
    key: Copies,
    value: Copies,
}

impl Conversion {
    /// Conversion of `map` between two layouts; an error says why its entries cannot be read.
    pub fn new(map: &str, from: &Layout, to: &Layout) -> Result<Self, String> {
        Self::between((from, map), (to, map))
    }

    /// Conversion between maps of different names.
    pub fn between((from, from_map): (&Layout, &str), (to, to_map): (&Layout, &str)) -> Result<Self, String> {
        let missing = |map: &str| format!("map {map} is not described");
        let (from_key, from_value) = from.maps.get(from_map).ok_or_else(|| missing(from_map))?;
        let (to_key, to_value) = to.maps.get(to_map).ok_or_else(|| missing(to_map))?;
        Ok(Self {
            key: Copies::new((from, from_key), (to, to_key))?,
            value: Copies::new((from, from_value), (to, to_value))?,
        })
    }

    /// Sizes of a key and of a value before the conversion, in bytes.
    pub fn source_sizes(&self) -> (usize, usize) {
        (self.key.from_size, self.value.from_size)
    }

    /// Converts an entry; none if the types do not have the sizes of the map.
    pub fn entry<K: zerocopy::FromBytes, V: zerocopy::FromBytes>(
        &self,
        key: &[u8],
        value: &[u8],
    ) -> Option<(K, V)> {
        let (mut to_key, mut to_value) = ([0; MAX_RECORD], [0; MAX_RECORD]);
        let (to_key, to_value) =
            (to_key.get_mut(..self.key.to_size)?, to_value.get_mut(..self.value.to_size)?);
        self.key.apply(key, to_key);
        self.value.apply(value, to_value);
        Some((K::read_from_bytes(to_key).ok()?, V::read_from_bytes(to_value).ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_common::{Flow, PortRange, Vip, VipKey, mapped};
    use zerocopy::IntoBytes;

    fn version_2() -> Layout {
        serde_json::from_str(include_str!("abi2.json")).expect("it is a layout")
    }

    #[test]
    fn versions_2_and_ours_read_each_other() {
        let (old, new) = (version_2(), Layout::ours());
        old.check().expect("version 2's layout is valid");
        new.check().expect("ours is valid");
        for map in describe::MAPS.iter().filter(|map| map.name != names::SYN_CACHE) {
            Conversion::new(map.name, &old, &new).expect("from 2 to ours");
            Conversion::new(map.name, &new, &old).expect("from ours to 2");
        }
        Conversion::between((&old, names::SYNS), (&new, names::FLOWS)).expect("their cached SYNs");
    }

    #[test]
    fn ours_fits_its_map() {
        let text = serde_json::to_vec(&Layout::ours()).expect("plain data");
        assert!(text.len() < names::LAYOUT_LEN, "{}", text.len());
    }

    #[test]
    fn an_entry_goes_to_another_layout_and_back() {
        let ours = Layout::ours();
        let mut other = ours.clone();
        // Reversed, with room in front.
        for name in ["Vip", "PortRange"] {
            let record = other.records.get_mut(name).expect("it is described");
            for FieldLayout(offset, size, _) in record.fields.values_mut() {
                *offset = record.size - *offset - *size + 8;
            }
            record.size += 8;
        }
        let range = other.records["PortRange"].size;
        let vip = other.records.get_mut("Vip").expect("it is described");
        let FieldLayout(offset, size, _) = vip.fields.get_mut("ranges").expect("it is described");
        (*offset, *size) = (vip.size, 16 * range);
        vip.size += 16 * range;
        let there = Conversion::new(names::VIPS, &ours, &other).expect("there");
        // A field that only the other layout has is left out on the way back.
        let vip = other.records.get_mut("Vip").expect("it is described");
        vip.fields.insert("news".to_owned(), FieldLayout(0, 8, None));
        let back = Conversion::new(names::VIPS, &other, &ours).expect("back");
        let error = Conversion::new(names::VIPS, &ours, &other).expect_err("no layout has this field");
        assert!(error.contains("Vip has no field news"), "{error}");

        let key = VipKey { vip: mapped([10, 0, 0, 1]) };
        let mut vip = Vip { any_tcp: 7, range_count: 2, ..Vip::EMPTY };
        vip.ranges[1] = PortRange { first: 1, last: 2, protocol: 17, service: 3 };
        let (mut other_key, mut other_vip) = (vec![0; there.key.to_size], vec![0; there.value.to_size]);
        there.key.apply(key.as_bytes(), &mut other_key);
        there.value.apply(vip.as_bytes(), &mut other_vip);
        assert_ne!(&other_vip[..size_of::<Vip>()], vip.as_bytes());
        assert_eq!(back.entry::<VipKey, Vip>(&other_key, &other_vip), Some((key, vip)));
    }

    #[test]
    fn fields_that_a_flow_needs_must_be_there() {
        let ours = Layout::ours();
        let lacking = |field: &str| {
            let mut other = ours.clone();
            other.records.get_mut("Flow").expect("it is described").fields.remove(field);
            Conversion::new(names::FLOWS, &other, &ours)
        };
        let error = lacking("backend").expect_err("its destination is unknown");
        assert!(error.contains("Flow has no field backend"), "{error}");
        let mut other = ours.clone();
        let flow = other.records.get_mut("Flow").expect("it is described");
        flow.fields.insert("backend".to_owned(), FieldLayout(0, 2, None));
        let error = Conversion::new(names::FLOWS, &other, &ours).expect_err("another type");
        assert!(error.contains("Flow.backend has another type"), "{error}");
        assert_eq!(size_of::<Flow>(), ours.sizes(names::FLOWS).map_or(0, |(_, value)| value));
    }

    #[test]
    fn a_layout_that_lies_is_refused() {
        let mut lying = Layout::ours();
        let flow = lying.records.get_mut("Flow").expect("it is described");
        flow.fields.insert("backend".to_owned(), FieldLayout(usize::MAX, 4, None));
        assert!(lying.check().is_err());
    }
}
