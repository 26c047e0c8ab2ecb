//! Kernel versions: the order of Debian's package versions of kernels, and kernel lines.

/// The numbers of a package version: the three upstream numbers, then those of the packaging.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(Vec<u32>);

impl Version {
    /// Parses a version: `7.3.4-1~bpo13+1` is 7, 3, 4, 1, 13, 1.
    pub fn parse(text: &str) -> Self {
        let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty());
        Self(numbers.map(|part| part.parse().unwrap_or(u32::MAX)).collect())
    }

    /// Whether the version belongs to a line: `6.1.192-2` belongs to 6.1, not to 6.12.
    pub fn is_of(&self, line: &str) -> bool {
        let line = Self::parse(line);
        self.0.starts_with(&line.0)
    }
}

#[cfg(test)]
mod tests {
    use super::Version;

    #[test]
    fn versions_are_ordered_by_number() {
        let mut all = ["6.12.117-1~deb12u1", "6.1.192-2", "7.3.4-1~bpo13+1", "6.1.192-1", "7.2.13-1"];
        all.sort_by_key(|text| Version::parse(text));
        assert_eq!(all, ["6.1.192-1", "6.1.192-2", "6.12.117-1~deb12u1", "7.2.13-1", "7.3.4-1~bpo13+1"]);
    }

    #[test]
    fn a_line_is_whole_numbers() {
        assert!(Version::parse("6.1.192-2").is_of("6.1"));
        assert!(!Version::parse("6.12.117-1").is_of("6.1"));
    }
}
