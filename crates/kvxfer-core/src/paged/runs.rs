//! Slots as runs: tokens that follow one another in a chunk and in a block.

/// Neighbours on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// First token, counted in the chunk.
    pub(super) token: usize,
    /// The block they are in.
    pub(super) block: usize,
    /// Place of the first one in the block.
    pub(super) place: usize,
    /// How many they are.
    pub(super) count: usize,
}

/// The runs of a chunk's slots, in the order of its tokens, without the first `skip`. Slots were checked.
pub(super) fn runs(slots: &[i64], skip: usize, block_size: usize) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::with_capacity(slots.len() / block_size + 2);
    // The slot that would continue the last run.
    let mut next = None;
    for (token, slot) in slots.iter().enumerate().skip(skip) {
        let slot = *slot as usize;
        match runs.last_mut() {
            Some(run) if next == Some(slot) => run.count += 1,
            _ => runs.push(Run { token, block: slot / block_size, place: slot % block_size, count: 1 }),
        }
        next = Some(slot + 1).filter(|next| next % block_size != 0);
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_at_blocks_and_at_jumps() {
        let run = |token, block, place, count| Run { token, block, place, count };
        let slots = [6, 7, 8, 9, 3, 20, 19, 20, 21];
        assert_eq!(
            runs(&slots, 1, 4),
            [
                run(1, 1, 3, 1),
                run(2, 2, 0, 2),
                run(4, 0, 3, 1),
                run(5, 5, 0, 1),
                run(6, 4, 3, 1),
                run(7, 5, 0, 2)
            ]
        );
        assert_eq!(runs(&[0, 1, 2, 3, 4, 5, 6, 7], 0, 4), [run(0, 0, 0, 4), run(4, 1, 0, 4)]);
        assert_eq!(runs(&slots, slots.len(), 4), []);
    }
}
