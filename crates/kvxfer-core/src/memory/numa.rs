//! Memory near a device.

/// As many nodes as a kernel may have.
const BITS: usize = 1024;
const WORDS: usize = BITS / 64;

/// Runs `make` so that the pages it touches first come from NUMA node `node`, where there are any left. Without a node, or where the
/// kernel refuses, it is simply run.
pub(crate) fn near_node<T>(node: Option<u32>, make: impl FnOnce() -> T) -> T {
    let Some(node) = node.filter(|n| *n < 64) else { return make() };
    let (mut mode_before, mut mask_before) = (0, [0u64; WORDS]);
    // SAFETY: an integer and a mask of as many bits as stated; it asks for this thread's policy.
    let asked = unsafe {
        libc::syscall(libc::SYS_get_mempolicy, &raw mut mode_before, mask_before.as_mut_ptr(), BITS, 0, 0)
    };
    let set = |mode: libc::c_int, mask: &[u64; WORDS]| {
        // SAFETY: a mask of as many bits as stated lives across the call; the policy is this thread's alone.
        unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask.as_ptr(), BITS) == 0 }
    };
    let mut mask = [0; WORDS];
    mask[0] = 1 << node;
    let preferred = asked == 0 && set(libc::MPOL_PREFERRED, &mask);
    let result = make();
    if preferred {
        set(mode_before, &mask_before);
    }
    result
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_made_is_made_on_any_node() {
        for node in [None, Some(0), Some(63), Some(4000)] {
            assert_eq!(super::near_node(node, || 7), 7);
        }
    }
}
