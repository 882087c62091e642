//! A Llama on the CPU, in f32, whose result for a token depends on that token and its context alone.
//!
//! That is what makes one prefiller and one decoder say the same as a single instance: floating-point sums change with the
//! order of addition, and the order inside a matrix product changes with the product's shape. So every product here has one of
//! a few fixed shapes, whatever the batch: rows go through the layers in tiles of [`ROWS`], attention multiplies [`ROWS`]
//! queries with whole chunks of keys and values, and what is missing is zero. A row's sums are then always made in the same
//! order: alone or among others, in a prompt or one by one, computed here or received from elsewhere.

mod cache;
mod config;
mod weights;

pub(crate) use cache::{Cache, Shape, pack, unpack};
pub(crate) use config::{Config, Rope};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor};
use candle_nn::ops::{rms_norm, silu};
use candle_nn::rotary_emb::rope_thd;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::path::Path;
use weights::Weights;

/// Rows of every matrix product.
const ROWS: usize = 16;

/// A model that can run.
pub(crate) struct Model {
    pub(crate) config: Config,
    /// Tells this model's weights from others': part of every chunk's key and of what a sender and a receiver compare.
    pub(crate) fingerprint: String,
    weights: Weights,
    /// `[positions, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
    chunk_tokens: usize,
    pool: rayon::ThreadPool,
}

/// Consecutive tokens of one sequence.
pub(crate) struct Piece<'a> {
    pub(crate) tokens: &'a [u32],
    /// Position of the first.
    pub(crate) start: usize,
    /// Holds every earlier token of the sequence.
    pub(crate) cache: &'a mut Cache,
    /// Index of the first token whose logits are wanted (`tokens.len()`: of none).
    pub(crate) logits_from: usize,
}

/// How a model is set up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    /// Longest sequence.
    pub(crate) positions: usize,
    /// Tokens of a chunk.
    pub(crate) chunk_tokens: usize,
    /// Threads that compute.
    pub(crate) threads: usize,
}

impl Model {
    /// Loads a Hugging Face folder.
    pub(crate) fn from_folder(
        folder: &Path,
        config: Config,
        setup: Setup,
    ) -> std::result::Result<Self, String> {
        let weights = weights::from_folder(&config, folder)?;
        Self::new(config, weights, setup)
    }

    /// Random weights.
    pub(crate) fn random(config: Config, seed: u64, setup: Setup) -> std::result::Result<Self, String> {
        config.check()?;
        let weights = weights::random(&config, seed)?;
        Self::new(config, weights, setup)
    }

    fn new(config: Config, weights: Weights, setup: Setup) -> std::result::Result<Self, String> {
        let Setup { positions, chunk_tokens, threads } = setup;
        let (cos, sin) = rotations(&config, positions).map_err(|e| e.to_string())?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("compute-{i}"))
            .build()
            .map_err(|e| format!("cannot start {threads} compute threads: {e}"))?;
        let fingerprint = fingerprint(&config, &weights).map_err(|e| e.to_string())?;
        Ok(Self { config, fingerprint, weights, cos, sin, chunk_tokens, pool })
    }

    /// The shape of a chunk of this model's cache.
    pub(crate) fn shape(&self) -> Shape {
        Shape { layers: self.config.layers, tokens: self.chunk_tokens, width: self.config.kv_width() }
    }

    /// Runs all pieces through the model and returns, for each, a row of logits per wanted token.
    pub(crate) fn forward(&self, pieces: &mut [Piece<'_>]) -> Result<Vec<Vec<Vec<f32>>>> {
        for piece in &mut *pieces {
            piece.cache.grow(piece.start + piece.tokens.len())?;
        }
        self.pool.install(|| self.run(pieces))
    }

    #[expect(
        clippy::many_single_char_names,
        reason = "x, h, q, k and v are the names of these tensors everywhere"
    )]
    fn run(&self, pieces: &[Piece<'_>]) -> Result<Vec<Vec<Vec<f32>>>> {
        let c = &self.config;
        let total: usize = pieces.iter().map(|p| p.tokens.len()).sum();
        let rows = total.next_multiple_of(ROWS);
        let mut tokens: Vec<u32> = pieces.iter().flat_map(|p| p.tokens).copied().collect();
        let mut positions: Vec<u32> = pieces
            .iter()
            .flat_map(|p| (p.start..p.start + p.tokens.len()).map(|position| position as u32))
            .collect();
        tokens.resize(rows, 0);
        positions.resize(rows, 0);
        let positions = Tensor::from_vec(positions, rows, &Device::Cpu)?;
        let (cos, sin) = (self.cos.index_select(&positions, 0)?, self.sin.index_select(&positions, 0)?);
        let turn = |x: &Tensor, heads: usize| -> Result<Tensor> {
            rope_thd(&x.reshape((1, rows, heads, c.head_dim))?, &cos, &sin)?
                .reshape((rows, heads * c.head_dim))
        };

        let tokens = Tensor::from_vec(tokens, rows, &Device::Cpu)?;
        let mut x = self.weights.embedding.index_select(&tokens, 0)?;
        for (i, layer) in self.weights.layers.iter().enumerate() {
            let h = rms_norm(&x, &layer.input_norm, c.eps as f32)?;
            let q = turn(&linear(&h, &layer.q)?, c.heads)?;
            let k = turn(&linear(&h, &layer.k)?, c.kv_heads)?;
            let v = linear(&h, &layer.v)?;
            let mut from = 0;
            let mut tiles = Vec::new();
            for piece in pieces {
                let n = piece.tokens.len();
                piece.cache.write(i, piece.start, &k.narrow(0, from, n)?, &v.narrow(0, from, n)?)?;
                for at in (0..n).step_by(ROWS) {
                    tiles.push((piece, piece.start + at, q.narrow(0, from + at, ROWS.min(n - at))?));
                }
                from += n;
            }
            let mut attended = tiles
                .into_par_iter()
                .map(|(piece, start, q)| self.attend(piece.cache, i, start, &q))
                .collect::<Result<Vec<_>>>()?;
            if rows > total {
                attended.push(Tensor::zeros((rows - total, c.heads * c.head_dim), DType::F32, &Device::Cpu)?);
            }
            x = (x + linear(&Tensor::cat(&attended, 0)?, &layer.o)?)?;
            let h = rms_norm(&x, &layer.post_norm, c.eps as f32)?;
            let h = (silu(&linear(&h, &layer.gate)?)? * linear(&h, &layer.up)?)?;
            x = (x + linear(&h, &layer.down)?)?;
        }
        self.logits(pieces, &x)
    }

    /// Attention of at most [`ROWS`] queries, the first at position `start`, over everything up to themselves.
    fn attend(&self, cache: &Cache, layer: usize, start: usize, q: &Tensor) -> Result<Tensor> {
        let c = &self.config;
        let n = q.dim(0)?;
        let (groups, size) = (c.heads / c.kv_heads, self.chunk_tokens);
        let q = if n < ROWS { q.pad_with_zeros(0, 0, ROWS - n)? } else { q.clone() };
        // [kv_heads, groups * ROWS, head_dim]: the queries that share a key/value head are rows of one product.
        let q = (q.reshape((ROWS, c.kv_heads, groups, c.head_dim))?.permute((1, 2, 0, 3))?.contiguous()?
            * (1.0 / (c.head_dim as f64).sqrt()))?
        .reshape((c.kv_heads, groups * ROWS, c.head_dim))?;
        let chunks = (start + n).div_ceil(size);
        let mut scores = Vec::with_capacity(chunks);
        for chunk in 0..chunks {
            let keys = cache.keys(chunk, layer)?.reshape((size, c.kv_heads, c.head_dim))?;
            scores.push(q.matmul(&keys.permute((1, 2, 0))?)?);
        }
        let scores = Tensor::cat(&scores, 2)?;
        scores.inplace_op1(&CausalSoftmax { start, width: chunks * size })?;
        let mut sum: Option<Tensor> = None;
        for chunk in 0..chunks {
            let values = cache.values(chunk, layer)?.reshape((size, c.kv_heads, c.head_dim))?;
            let part = scores.narrow(2, chunk * size, size)?.matmul(&values.permute((1, 0, 2))?)?;
            sum = Some(match sum {
                None => part,
                Some(sum) => (sum + part)?,
            });
        }
        let Some(sum) = sum else { candle_core::bail!("attention over nothing") };
        let sum = sum.reshape((c.kv_heads, groups, ROWS, c.head_dim))?.permute((2, 0, 1, 3))?;
        sum.contiguous()?.reshape((ROWS, c.heads * c.head_dim))?.narrow(0, 0, n)
    }

    fn logits(&self, pieces: &[Piece<'_>], x: &Tensor) -> Result<Vec<Vec<Vec<f32>>>> {
        let mut wanted = Vec::new();
        let mut from = 0;
        for piece in pieces {
            wanted.extend((piece.logits_from..piece.tokens.len()).map(|i| (from + i) as u32));
            from += piece.tokens.len();
        }
        if wanted.is_empty() {
            return Ok(pieces.iter().map(|_| Vec::new()).collect());
        }
        let count = wanted.len();
        wanted.resize(count.next_multiple_of(ROWS), 0);
        let wanted = Tensor::from_vec(wanted, count.next_multiple_of(ROWS), &Device::Cpu)?;
        let h = rms_norm(&x.index_select(&wanted, 0)?, &self.weights.norm, self.config.eps as f32)?;
        let mut rows = linear(&h, &self.weights.head)?.to_vec2::<f32>()?.into_iter();
        Ok(pieces
            .iter()
            .map(|p| rows.by_ref().take(p.tokens.len().saturating_sub(p.logits_from)).collect())
            .collect())
    }
}

/// `x * w^T` in tiles of [`ROWS`] rows.
fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let w = w.t()?;
    let rows = x.dim(0)?;
    if rows == ROWS {
        return x.matmul(&w);
    }
    let tiles = (0..rows / ROWS)
        .into_par_iter()
        .map(|i| x.narrow(0, i * ROWS, ROWS)?.matmul(&w))
        .collect::<Result<Vec<_>>>()?;
    Tensor::cat(&tiles, 0)
}

/// Softmax over the last dimension, row `r` over its first `start + r % ROWS + 1` elements; the rest becomes zero.
struct CausalSoftmax {
    start: usize,
    width: usize,
}

impl InplaceOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(all), Some((from, to))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("causal softmax takes contiguous f32");
        };
        for (i, row) in all[from..to].chunks_exact_mut(self.width).enumerate() {
            let (seen, masked) = row.split_at_mut((self.start + i % ROWS + 1).min(self.width));
            softmax(seen);
            masked.fill(0.0);
        }
        Ok(())
    }
}

/// Softmax in place, in lanes that the compiler turns into vectors; the order of its sum depends on the length alone.
fn softmax(row: &mut [f32]) {
    const LANES: usize = 8;
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0.0; LANES];
    let (whole, rest) = row.as_chunks_mut::<LANES>();
    for lanes in whole {
        for (v, sum) in lanes.iter_mut().zip(&mut sums) {
            *v = exp(*v - max);
            *sum += *v;
        }
    }
    for (v, sum) in rest.iter_mut().zip(&mut sums) {
        *v = exp(*v - max);
        *sum += *v;
    }
    let scale = 1.0 / sums.iter().sum::<f32>();
    for v in row {
        *v *= scale;
    }
}

/// e^x for x <= 0, to within two units in the last place: 2^n times a polynomial in the rest, without a branch or a call.
fn exp(x: f32) -> f32 {
    // Adding it leaves the nearest whole number in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.max(-87.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, the first of which is exact in few bits.
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let terms = [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let tail = terms.into_iter().fold(1.987_569_2e-4, |sum, term| sum * r + term);
    let rest = tail * r * r + r + 1.0;
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    rest * f32::from_bits(power)
}

/// Cosines and sines of every position's rotation.
fn rotations(config: &Config, positions: usize) -> Result<(Tensor, Tensor)> {
    let half = config.head_dim / 2;
    let frequencies: Vec<f64> = (0..half)
        .map(|i| frequency(&config.rope, config.rope.theta.powf(-2.0 * i as f64 / config.head_dim as f64)))
        .collect();
    let angles = |f: fn(f64) -> f64| -> Vec<f32> {
        (0..positions).flat_map(|p| frequencies.iter().map(move |w| f(p as f64 * w) as f32)).collect()
    };
    let tensor = |values| Tensor::from_vec(values, (positions, half), &Device::Cpu);
    Ok((tensor(angles(f64::cos))?, tensor(angles(f64::sin))?))
}

/// Llama 3.1 slows the rotations that do not come round within the original context, with a soft edge.
fn frequency(rope: &Rope, f: f64) -> f64 {
    let Some(s) = &rope.llama3 else { return f };
    let wavelength = 2.0 * std::f64::consts::PI / f;
    let low = s.original_max_position_embeddings / s.low_freq_factor;
    let high = s.original_max_position_embeddings / s.high_freq_factor;
    if wavelength < high {
        f
    } else if wavelength > low {
        f / s.factor
    } else {
        let edge = (s.original_max_position_embeddings / wavelength - s.low_freq_factor)
            / (s.high_freq_factor - s.low_freq_factor);
        (1.0 - edge) * f / s.factor + edge * f
    }
}

/// A hash of the configuration and of samples of every matrix.
fn fingerprint(config: &Config, weights: &Weights) -> Result<String> {
    const SAMPLES: usize = 64;
    let mut hash = Sha256::new();
    hash.update(format!("{config:?}"));
    let mut take = |tensor: &Tensor| -> Result<()> {
        let flat = tensor.flatten_all()?;
        let len = flat.dim(0)?;
        for i in 0..SAMPLES.min(len) {
            let value: f32 = flat.get(i * len / SAMPLES.min(len))?.to_scalar()?;
            hash.update(value.to_le_bytes());
        }
        Ok(())
    };
    take(&weights.embedding)?;
    take(&weights.head)?;
    for l in &weights.layers {
        for tensor in [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down, &l.input_norm, &l.post_norm] {
            take(tensor)?;
        }
    }
    Ok(hex(&hash.finalize()[..8]))
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}

#[cfg(test)]
mod tests;
