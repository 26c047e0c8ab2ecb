//! Properties of a network interface by ioctl: driver, MTU, carrier, offloads. No tool needs to be installed.
//!
//! Every call works in the network namespace of the calling thread.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

const SIOCETHTOOL: libc::c_ulong = 0x8946;
const GET_DRIVER: u32 = 0x03;
const GET_STRINGS: u32 = 0x1b;
const GET_SET_INFO: u32 = 0x37;
const GET_FEATURES: u32 = 0x3a;
const SET_FEATURES: u32 = 0x3b;
/// `ETH_SS_FEATURES`.
const FEATURE_NAMES: u32 = 4;
/// Length of an offload's name in bytes.
const NAME: usize = 32;

/// Large receive offload, as the kernel calls it (`ethtool -k`: large-receive-offload).
pub const LRO: &str = "rx-lro";
/// VLAN tag stripping by the NIC (`ethtool -k`: rx-vlan-offload).
pub const RX_VLAN: &str = "rx-vlan-hw-parse";
/// Hardware GRO: the NIC joins packets, and software can split them again.
pub const RX_GRO_HW: &str = "rx-gro-hw";

/// An offload of an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Feature {
    /// Whether the offload is on.
    pub is_on: bool,
    /// Whether the driver does not allow a change.
    pub is_fixed: bool,
}

/// Socket for the ioctls.
#[derive(Debug)]
pub struct Ethtool(OwnedFd);

/// State of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// Up, with a carrier.
    Up,
    /// Set down by an administrator.
    Down,
    /// Up, without a carrier.
    NoCarrier,
}

impl Ethtool {
    /// Opens a socket for the ioctls.
    ///
    /// # Errors
    /// The socket cannot be opened.
    pub fn open() -> io::Result<Self> {
        // SAFETY: no address is passed.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Runs an ioctl on an interface; `value` is the value of the request's union.
    fn ioctl(
        &self,
        interface: &str,
        request: libc::c_ulong,
        value: libc::__c_anonymous_ifr_ifru,
    ) -> io::Result<libc::ifreq> {
        let mut query = libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru: value };
        if interface.len() >= libc::IFNAMSIZ {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        for (to, from) in query.ifr_name.iter_mut().zip(interface.bytes()) {
            *to = from as libc::c_char;
        }
        // SAFETY: the request is a whole ifreq; a pointer in it is to a buffer that the caller holds.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, &raw mut query) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(query)
    }

    /// Runs an ethtool command; the buffer begins with its number.
    fn command(&self, interface: &str, buffer: &mut [u32]) -> io::Result<()> {
        let value = libc::__c_anonymous_ifr_ifru { ifru_data: buffer.as_mut_ptr().cast() };
        self.ioctl(interface, SIOCETHTOOL, value).map(drop)
    }

    /// Returns the name of the driver.
    ///
    /// # Errors
    /// The interface does not exist, or its driver does not report a name.
    pub fn driver(&self, interface: &str) -> io::Result<String> {
        // struct ethtool_drvinfo: 196 bytes, the name follows the command.
        let mut buffer = [0u32; 49];
        buffer[0] = GET_DRIVER;
        self.command(interface, &mut buffer)?;
        Ok(text(&buffer[1..9]))
    }

    /// Returns the MTU.
    ///
    /// # Errors
    /// The interface does not exist.
    pub fn mtu(&self, interface: &str) -> io::Result<u32> {
        let value = libc::__c_anonymous_ifr_ifru { ifru_mtu: 0 };
        let answer = self.ioctl(interface, libc::SIOCGIFMTU as _, value)?;
        // SAFETY: the kernel has written this member.
        Ok(unsafe { answer.ifr_ifru.ifru_mtu }.cast_unsigned())
    }

    /// State of the link.
    ///
    /// # Errors
    /// The interface does not exist.
    pub fn state(&self, interface: &str) -> io::Result<LinkState> {
        let value = libc::__c_anonymous_ifr_ifru { ifru_flags: 0 };
        let answer = self.ioctl(interface, libc::SIOCGIFFLAGS as _, value)?;
        // SAFETY: the kernel has written this member.
        let flags = i32::from(unsafe { answer.ifr_ifru.ifru_flags });
        Ok(match (flags & libc::IFF_UP != 0, flags & libc::IFF_RUNNING != 0) {
            (false, _) => LinkState::Down,
            (true, false) => LinkState::NoCarrier,
            (true, true) => LinkState::Up,
        })
    }

    /// Returns the names of all offloads, by number.
    fn feature_names(&self, interface: &str) -> io::Result<Vec<String>> {
        // struct ethtool_sset_info: command, reserved, a mask of 64 bits, and the number for its one bit.
        let mut info = [GET_SET_INFO, 0, 1 << FEATURE_NAMES, 0, 0];
        self.command(interface, &mut info)?;
        let count = info[4] as usize;
        // struct ethtool_gstrings: command, set, number, names.
        let mut strings = vec![0u32; 3 + count * NAME / 4];
        strings[..3].copy_from_slice(&[GET_STRINGS, FEATURE_NAMES, info[4]]);
        self.command(interface, &mut strings)?;
        Ok(strings[3..].chunks_exact(NAME / 4).map(text).collect())
    }

    /// Returns all offloads by the kernel's names.
    ///
    /// # Errors
    /// The interface does not exist, or its driver does not report offloads.
    pub fn features(&self, interface: &str) -> io::Result<BTreeMap<String, Feature>> {
        let names = self.feature_names(interface)?;
        let blocks = names.len().div_ceil(32);
        // struct ethtool_gfeatures: command, number of blocks; each: available, requested, active, never changed.
        let mut buffer = vec![0u32; 2 + blocks * 4];
        (buffer[0], buffer[1]) = (GET_FEATURES, blocks as u32);
        self.command(interface, &mut buffer)?;
        let feature = |i: usize| {
            let bit = |word: usize| buffer[2 + i / 32 * 4 + word] >> (i % 32) & 1 != 0;
            Feature { is_on: bit(2), is_fixed: bit(3) || !bit(0) }
        };
        Ok(names.into_iter().enumerate().map(|(i, name)| (name, feature(i))).collect())
    }

    /// Switches an offload off; returns false if it stays on.
    ///
    /// # Errors
    /// The interface or offload does not exist, or the caller lacks permission.
    pub fn switch_off(&self, interface: &str, feature: &str) -> io::Result<bool> {
        let names = self.feature_names(interface)?;
        let unknown =
            || io::Error::new(io::ErrorKind::NotFound, format!("the interface has no offload {feature}"));
        let place = names.iter().position(|name| name == feature).ok_or_else(unknown)?;
        let blocks = names.len().div_ceil(32);
        // struct ethtool_sfeatures: command, number of blocks; each: bits to set, and their values.
        let mut buffer = vec![0u32; 2 + blocks * 2];
        (buffer[0], buffer[1]) = (SET_FEATURES, blocks as u32);
        buffer[2 + place / 32 * 2] = 1 << (place % 32);
        self.command(interface, &mut buffer)?;
        Ok(!self.features(interface)?.get(feature).is_some_and(|f| f.is_on))
    }
}

/// Text up to the first zero byte.
fn text(words: &[u32]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_reports_its_properties() {
        let tool = Ethtool::open().expect("a socket");
        assert!(tool.mtu("lo").expect("it has an MTU") >= 1_280);
        let features = tool.features("lo").expect("it has offloads");
        assert!(features.contains_key(RX_VLAN) && features.contains_key(LRO), "{features:?}");
        assert!(features[LRO].is_fixed && !features[LRO].is_on, "{:?}", features[LRO]);
        let missing = tool.mtu("no-such-one").expect_err("there is none");
        assert_eq!(missing.raw_os_error(), Some(libc::ENODEV));
        let long = tool.mtu("a-name-that-is-too-long").expect_err("there is none");
        assert_eq!(long.raw_os_error(), Some(libc::ENODEV));
    }
}
