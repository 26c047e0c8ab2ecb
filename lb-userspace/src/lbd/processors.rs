//! Counts the processors that packets arrive on.

/// Returns the number of online processors of this host: packets arrive on all of them, whatever lbd's own CPU mask is.
pub fn online() -> u32 {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").ok();
    let configured = || match nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN) {
        Ok(Some(n)) => u32::try_from(n).ok(),
        _ => None,
    };
    online.and_then(|list| count_in(&list)).or_else(configured).unwrap_or(1).max(1)
}

/// Counts the numbers in a list such as `0-3,8`.
fn count_in(list: &str) -> Option<u32> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    list.trim().split(',').map(range).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_counted_as_the_kernel_lists_them() {
        for (list, count) in [("0\n", 1), ("0-63\n", 64), ("0-3,8-11,16", 9), ("1,3,5\n", 3)] {
            assert_eq!(count_in(list), Some(count), "{list}");
        }
        for list in ["", "x", "3-1", "0-"] {
            assert_eq!(count_in(list), None, "{list}");
        }
    }

    #[test]
    fn the_cpu_mask_of_lbd_does_not_change_the_count() {
        let all = online();
        let mask = || {
            let mut one = nix::sched::CpuSet::new();
            one.set(0).expect("there is a first processor");
            nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &one).expect("it may be narrowed");
            online()
        };
        let masked = std::thread::spawn(mask).join().expect("it does not panic");
        assert_eq!(masked, all);
    }
}
