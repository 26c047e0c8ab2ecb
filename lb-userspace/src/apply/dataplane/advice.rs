//! Advice for a driver that refuses the program, from its message and the error number.

use std::io;

/// Facts about a refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal<'a> {
    /// Name of the interface.
    pub interface: &'a str,
    /// Name of its driver, empty if unknown.
    pub driver: &'a str,
    /// MTU of the interface, if known.
    pub mtu: Option<u32>,
    /// Message of the kernel or driver, if any.
    pub sentence: Option<&'a str>,
    /// Error number.
    pub errno: i32,
}

/// Causes of refusals, each with its own remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The driver does not support XDP.
    NoXdp,
    /// The MTU is too large.
    Mtu,
    /// There are too few or too many queues.
    Queues,
    /// The NIC joins packets (LRO, hardware GRO).
    Joining,
    /// The NIC splits headers from data.
    HeaderSplit,
    /// Another cause.
    Other,
}

impl Refusal<'_> {
    /// Determines the cause from message, error number and MTU.
    pub fn cause(&self) -> Cause {
        let message = self.sentence.unwrap_or_default().to_lowercase();
        let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
        if says(&["does not support xdp", "doesn't support xdp", "not support native"]) {
            Cause::NoXdp
        } else if says(&["header split", "header-split", "data split", "data-split", "hds"]) {
            Cause::HeaderSplit
        } else if says(&[
            "lro",
            "large receive",
            "gro_hw",
            "gro-hw",
            "hw gro",
            "hw-gro",
            "guest_csum",
            "guest offload",
        ]) {
            Cause::Joining
        } else if says(&[
            "mtu",
            "frame size",
            "buffer size",
            "too large",
            "jumbo",
            "single-buffer",
            "single buffer",
        ]) {
            Cause::Mtu
        } else if says(&["queue", "channel", "ring"]) {
            Cause::Queues
        } else {
            match self.errno {
                libc::ENOSPC | libc::ENOMEM => Cause::Queues,
                libc::ERANGE | libc::E2BIG => Cause::Mtu,
                libc::EINVAL | libc::EOPNOTSUPP if message.is_empty() && self.mtu > Some(1_500) => Cause::Mtu,
                libc::EOPNOTSUPP if message.is_empty() => Cause::NoXdp,
                _ => Cause::Other,
            }
        }
    }

    /// Whether the same attempt may succeed later without a change of lbd's settings: it depends on the configuration of
    /// the interface, which may change, or be completed only later while the host boots.
    pub fn may_pass(&self) -> bool {
        self.cause() != Cause::NoXdp
    }

    /// Advice for the operator.
    pub fn advice(&self) -> String {
        let name = self.interface;
        match self.cause() {
            Cause::NoXdp => "its driver does not support native XDP: choose another interface".to_owned(),
            Cause::Mtu => {
                let mtu = self.mtu.map_or(String::new(), |mtu| format!(" from {mtu}"));
                format!(
                    "lower its MTU{mtu} before lbd attaches: `ip link set dev {name} mtu {}`",
                    largest_mtu(self.driver)
                )
            }
            Cause::Queues if self.driver == "veth" => format!(
                "give it as many rx queues as its peer has tx queues: `ethtool -L {name} rx N`, or create the pair with \
                 numrxqueues N"
            ),
            Cause::Queues => format!(
                "leave queues for XDP: `ethtool -l {name}` shows the queues, `ethtool -L {name} combined N` sets N of them \
                 (at most half of the maximum, or one per CPU)"
            ),
            Cause::Joining => {
                format!(
                    "switch LRO and hardware GRO off: `ethtool -K {name} lro off` and `ethtool -K {name} rx-gro-hw off`"
                )
            }
            Cause::HeaderSplit => format!("switch header split off: `ethtool -G {name} tcp-data-split off`"),
            Cause::Other => format!("see `dmesg` and `ethtool -i {name}`"),
        }
    }

    /// Message and error in one sentence.
    pub fn why(&self) -> String {
        let error = io::Error::from_raw_os_error(self.errno);
        match self.sentence {
            Some(sentence) => format!("{} ({error})", sentence.trim_end_matches('.')),
            None => error.to_string(),
        }
    }
}

/// Largest MTU that a driver accepts with XDP and without frags.
fn largest_mtu(driver: &str) -> u32 {
    match driver {
        "ena" => 3_498,
        "ixgbe" | "ixgbevf" => 3_050,
        "igc" => 1_500,
        "gve" => 2_032,
        "mana" | "hv_netvsc" | "virtio_net" => 3_506,
        "vmxnet3" => 3_494,
        _ => super::variant::PAGE_MTU,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(driver: &'static str, sentence: Option<&'static str>, errno: i32) -> Refusal<'static> {
        Refusal { interface: "e0", driver, mtu: Some(9_000), sentence, errno }
    }

    #[test]
    fn drivers_messages_lead_to_advice() {
        use Cause::{HeaderSplit, Joining, Mtu, NoXdp, Other, Queues};
        for (driver, sentence, errno, cause, help) in [
            (
                "lo",
                Some("Underlying driver does not support XDP in native mode"),
                libc::EOPNOTSUPP,
                NoXdp,
                "another",
            ),
            ("r8169", None, libc::EOPNOTSUPP, Mtu, "mtu 3046"),
            (
                "veth",
                Some("XDP expects number of rx queues not less than peer tx queues"),
                libc::ENOSPC,
                Queues,
                "numrxqueues",
            ),
            ("veth", Some("Peer MTU is too large to set XDP"), libc::ERANGE, Mtu, "mtu 3046"),
            (
                "ena",
                Some(
                    "Failed to set xdp program, the Rx/Tx channel count should be at most half of the maximum allowed channel count",
                ),
                libc::EINVAL,
                Queues,
                "ethtool -L e0",
            ),
            (
                "ena",
                Some(
                    "Failed to set xdp program, the current MTU (9001) is larger than the maximum allowed MTU (3498) while xdp is on",
                ),
                libc::EINVAL,
                Mtu,
                "mtu 3498",
            ),
            (
                "igb",
                Some("The RX buffer size is too small for the frame size"),
                libc::EINVAL,
                Mtu,
                "mtu 3046",
            ),
            ("ixgbe", None, libc::EINVAL, Mtu, "mtu 3050"),
            (
                "virtio_net",
                Some("Can't set XDP while host is implementing GRO_HW/CSUM, disable GRO_HW/CSUM first"),
                libc::EOPNOTSUPP,
                Joining,
                "rx-gro-hw off",
            ),
            ("virtio_net", Some("MTU too large to enable XDP"), libc::EINVAL, Mtu, "mtu 3506"),
            ("virtio_net", None, libc::ENOMEM, Queues, "ethtool -L e0"),
            ("mlx5_core", Some("XDP is not supported with LRO"), libc::EINVAL, Joining, "lro off"),
            (
                "bnxt_en",
                Some("XDP is disallowed when HDS is enabled."),
                libc::EOPNOTSUPP,
                HeaderSplit,
                "tcp-data-split off",
            ),
            ("i40e", None, libc::EIO, Other, "dmesg"),
        ] {
            let refusal = refusal(driver, sentence, errno);
            assert_eq!(refusal.cause(), cause, "{refusal:?}");
            assert!(refusal.advice().contains(help), "{refusal:?}: {}", refusal.advice());
            assert_eq!(refusal.may_pass(), cause != NoXdp, "{refusal:?}");
        }
    }

    #[test]
    fn without_a_sentence_and_a_large_mtu_there_is_no_xdp() {
        let refusal = Refusal { mtu: Some(1_500), ..refusal("r8169", None, libc::EOPNOTSUPP) };
        assert_eq!(refusal.cause(), Cause::NoXdp);
        assert!(refusal.why().contains("not supported"), "{}", refusal.why());
    }
}
