//! From logits to a token.
//!
//! The randomness of a token comes from the request's seed, the choice and the token's position, not from a stream: so a
//! sampled text, too, is the same whether one instance wrote all of it or a decoder went on behind a prefiller's first token.

use std::collections::HashMap;

/// How tokens are chosen.
#[derive(Clone, Debug)]
pub(crate) struct Sampling {
    /// 0 takes the likeliest.
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    /// 0: all.
    pub(crate) top_k: usize,
    pub(crate) min_p: f32,
    pub(crate) seed: u64,
    pub(crate) presence: f32,
    pub(crate) frequency: f32,
    pub(crate) repetition: f32,
    pub(crate) bias: Vec<(u32, f32)>,
    /// Tokens to list with their probabilities, beside the chosen one.
    pub(crate) logprobs: Option<usize>,
}

/// A token with its log probability.
pub(crate) type Scored = (u32, f32);

/// The choice of one step.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Choice {
    pub(crate) token: u32,
    /// The chosen token first, then the likeliest others in order; before temperature and penalties.
    pub(crate) logprobs: Option<Vec<Scored>>,
}

/// Chooses the token at `position`; `prompt` and `output` count for penalties, `banned` are not taken.
pub(crate) fn sample(
    sampling: &Sampling,
    logits: &[f32],
    prompt: &[u32],
    output: &[u32],
    banned: &[u32],
    choice: u64,
    position: u64,
) -> Choice {
    let mut adjusted = logits.to_vec();
    penalize(sampling, &mut adjusted, prompt, output);
    for &token in banned {
        if let Some(v) = adjusted.get_mut(token as usize) {
            *v = f32::NEG_INFINITY;
        }
    }
    let token = if sampling.temperature < 1e-5 {
        best(&adjusted)
    } else {
        draw(sampling, adjusted, uniform(sampling.seed, choice, position))
    };
    Choice { token, logprobs: sampling.logprobs.map(|n| logprobs(logits, token, n)) }
}

/// The chosen token and the `n` likeliest, with log probabilities.
pub(crate) fn logprobs(logits: &[f32], token: u32, n: usize) -> Vec<Scored> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|v| (v - max).exp()).sum();
    let score = |i: u32| logits.get(i as usize).map_or(f32::NEG_INFINITY, |v| v - max - sum.ln());
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let n = n.min(order.len());
    let cmp = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if n > 0 && n < order.len() {
        order.select_nth_unstable_by(n - 1, cmp);
    }
    order.truncate(n);
    order.sort_unstable_by(cmp);
    std::iter::once(token).chain(order.into_iter().filter(|t| *t != token)).map(|t| (t, score(t))).collect()
}

fn penalize(sampling: &Sampling, logits: &mut [f32], prompt: &[u32], output: &[u32]) {
    if (sampling.repetition - 1.0).abs() > f32::EPSILON {
        let seen: std::collections::BTreeSet<u32> = prompt.iter().chain(output).copied().collect();
        for token in seen {
            if let Some(v) = logits.get_mut(token as usize) {
                *v = if *v > 0.0 { *v / sampling.repetition } else { *v * sampling.repetition };
            }
        }
    }
    if sampling.presence != 0.0 || sampling.frequency != 0.0 {
        let mut counts: HashMap<u32, f32> = HashMap::new();
        for &token in output {
            *counts.entry(token).or_default() += 1.0;
        }
        for (token, count) in counts {
            if let Some(v) = logits.get_mut(token as usize) {
                *v -= sampling.presence + sampling.frequency * count;
            }
        }
    }
    for &(token, bias) in &sampling.bias {
        if let Some(v) = logits.get_mut(token as usize) {
            *v += bias;
        }
    }
}

/// The likeliest; of equals the first.
fn best(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, v) in logits.iter().enumerate() {
        if *v > logits[best] {
            best = i;
        }
    }
    best as u32
}

fn draw(sampling: &Sampling, logits: Vec<f32>, u: f32) -> u32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut weights: Vec<(u32, f32)> = logits
        .into_iter()
        .enumerate()
        .map(|(i, v)| (i as u32, ((v - max) / sampling.temperature).exp()))
        .collect();
    weights.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if sampling.top_k > 0 {
        weights.truncate(sampling.top_k);
    }
    // The likeliest has weight 1.
    weights.retain(|w| w.1 >= sampling.min_p);
    let total: f32 = weights.iter().map(|w| w.1).sum();
    let mut kept = 0.0;
    let enough = weights.iter().position(|w| {
        kept += w.1;
        kept >= sampling.top_p * total
    });
    weights.truncate(enough.map_or(weights.len(), |i| i + 1));
    let mut left = u * weights.iter().map(|w| w.1).sum::<f32>();
    for (token, weight) in &weights {
        left -= weight;
        if left < 0.0 {
            return *token;
        }
    }
    weights.last().map_or(0, |w| w.0)
}

/// In 0..1, the same for the same arguments.
fn uniform(seed: u64, choice: u64, position: u64) -> f32 {
    let mut x =
        seed ^ choice.wrapping_mul(0xd6e8_feb8_6659_fd93) ^ position.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for _ in 0..2 {
        x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
    }
    (x >> 40) as f32 / (1u64 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 1,
            presence: 0.0,
            frequency: 0.0,
            repetition: 1.0,
            bias: Vec::new(),
            logprobs: None,
        }
    }

    /// How often each of three tokens is drawn out of 30,000.
    fn counts(sampling: &Sampling) -> [i32; 3] {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
        let mut counts = [0; 3];
        for position in 0..30_000 {
            counts[sample(sampling, &logits, &[], &[], &[], 0, position).token as usize] += 1;
        }
        counts
    }

    #[test]
    fn draws_follow_the_weights_and_the_limits() {
        let [a, b, c] = counts(&sampling());
        assert!((a - 15_000).abs() < 400 && (b - 9000).abs() < 400 && (c - 6000).abs() < 400, "{a} {b} {c}");
        let [a, b, c] = counts(&Sampling { top_k: 2, ..sampling() });
        assert!((a - 18_750).abs() < 400 && b + a == 30_000 && c == 0, "{a} {b} {c}");
        assert_eq!(counts(&Sampling { top_p: 0.5, ..sampling() }), [30_000, 0, 0]);
        assert_eq!(counts(&Sampling { min_p: 0.55, ..sampling() })[2], 0);
        assert_eq!(counts(&Sampling { temperature: 0.0, ..sampling() }), [30_000, 0, 0]);
    }

    #[test]
    fn penalties_bias_and_bans_change_the_choice() {
        let greedy = Sampling { temperature: 0.0, ..sampling() };
        let logits = [2.0, 1.9, -1.0];
        let choose = |s: &Sampling, banned: &[u32]| sample(s, &logits, &[], &[0, 0], banned, 0, 0).token;
        assert_eq!(choose(&greedy, &[]), 0);
        assert_eq!(choose(&greedy, &[0]), 1);
        assert_eq!(choose(&Sampling { presence: 0.2, ..greedy.clone() }, &[]), 1);
        assert_eq!(choose(&Sampling { frequency: 0.06, ..greedy.clone() }, &[]), 1);
        assert_eq!(choose(&Sampling { repetition: 1.1, ..greedy.clone() }, &[]), 1);
        assert_eq!(choose(&Sampling { bias: vec![(2, 10.0)], ..greedy }, &[]), 2);
    }

    #[test]
    fn the_chosen_token_leads_its_logprobs() {
        let scored = logprobs(&[1.0, 3.0, 2.0], 0, 2);
        assert_eq!(scored.iter().map(|s| s.0).collect::<Vec<_>>(), [0, 1, 2]);
        let sum: f32 = scored.iter().map(|s| s.1.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-5);
    }
}
