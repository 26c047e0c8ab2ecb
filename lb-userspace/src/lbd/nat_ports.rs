//! Checks whether the kernel may give the source ports of mode `nat` to sockets of this host.
//!
//! A socket of this host that is connected to a worker's service port, from a port that a translated flow uses towards the
//! same worker, would lose its responses to that flow. Input: the kernel's settings. Output: the problem and its fix, if
//! there is one. Called at the start of `lbd ingress`.

use std::fs;

/// Returns the lowest and the highest port of `range` that the kernel gives to sockets and that are not reserved.
fn shared(range: (u16, u16), local: &str, reserved: &str) -> Option<(u16, u16)> {
    let mut bounds = local.split_whitespace().filter_map(|n| n.parse::<u16>().ok());
    let (first, last) = (bounds.next()?, bounds.next()?);
    let reserved: Vec<(u16, u16)> = reserved
        .trim()
        .split(',')
        .filter_map(|part| {
            let (a, b) = part.split_once('-').unwrap_or((part, part));
            Some((a.trim().parse().ok()?, b.trim().parse().ok()?))
        })
        .collect();
    let is_free = |port: &u16| !reserved.iter().any(|(a, b)| a <= port && port <= b);
    let mut both = (range.0.max(first)..=range.1.min(last)).filter(is_free);
    let least = both.next()?;
    Some((least, both.next_back().unwrap_or(least)))
}

/// Describes the problem with these ports on this host, and the command that fixes it.
pub fn problem(first: u16, last: u16) -> Option<String> {
    let read = |name: &str| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default();
    let reserved = read("ip_local_reserved_ports");
    let (low, high) = shared((first, last), &read("ip_local_port_range"), &reserved)?;
    let old = reserved.trim();
    let separator = if old.is_empty() { "" } else { "," };
    Some(format!(
        "the kernel may use ports {low} to {high} of nat_ports {first}-{last} for this host's own connections too, \
         which would lose responses of workers: run `sysctl -w net.ipv4.ip_local_reserved_ports={old}{separator}{low}-{high}`, \
         or choose other nat_ports"
    ))
}

#[cfg(test)]
mod tests {
    use super::shared;

    #[test]
    fn what_the_kernel_gives_away_is_found() {
        for (range, local, reserved, found) in [
            ((10_240, 32_767), "32768\t60999\n", "\n", None),
            ((10_240, 32_768), "32768\t60999\n", "", Some((32_768, 32_768))),
            ((1_024, 65_535), "32768 60999", "", Some((32_768, 60_999))),
            ((1_024, 65_535), "32768 60999", "32768-60999", None),
            ((1_024, 65_535), "32768 60999", "80,32768-40000,60999", Some((40_001, 60_998))),
            ((10_240, 32_767), "1024 2000", "", None),
            ((10_240, 32_767), "nonsense", "", None),
        ] {
            assert_eq!(shared(range, local, reserved), found, "{range:?} {local:?} {reserved:?}");
        }
    }
}
