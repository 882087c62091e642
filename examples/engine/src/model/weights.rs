//! A model's weights: from safetensors, or random from a seed.

use super::config::Config;
use candle_core::{DType, Device, Result, Tensor};
use std::collections::HashMap;
use std::path::Path;

/// One transformer layer; matrices are `[out, in]` as in the files.
pub(super) struct Layer {
    pub(super) input_norm: Tensor,
    pub(super) q: Tensor,
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    pub(super) o: Tensor,
    pub(super) post_norm: Tensor,
    pub(super) gate: Tensor,
    pub(super) up: Tensor,
    pub(super) down: Tensor,
}

/// All weights, f32.
pub(super) struct Weights {
    pub(super) embedding: Tensor,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Tensor,
    pub(super) head: Tensor,
}

/// Reads every `*.safetensors` of the folder.
pub(super) fn from_folder(config: &Config, folder: &Path) -> std::result::Result<Weights, String> {
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .map_err(|e| format!("cannot read {}: {e}", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    if files.is_empty() {
        return Err(format!("no *.safetensors in {}", folder.display()));
    }
    let mut all = HashMap::new();
    for file in &files {
        let tensors = candle_core::safetensors::load(file, &Device::Cpu)
            .map_err(|e| format!("{}: {e}", file.display()))?;
        all.extend(tensors);
    }
    build(config, |name, dims| {
        let tensor =
            all.get(name).ok_or_else(|| candle_core::Error::Msg(format!("no tensor named {name}")).bt())?;
        if tensor.dims() != dims {
            candle_core::bail!("{name} has shape {:?}; config.json says {dims:?}", tensor.dims());
        }
        tensor.to_dtype(DType::F32)?.contiguous()
    })
    .map_err(|e| format!("{}: {e}", folder.display()))
}

/// Uniform weights of the usual variance, the same on every machine. Only tokens below `speaks` that are printable are ever
/// likely: a text of random weights is then at least a line of text.
pub(super) fn random(config: &Config, seed: u64) -> std::result::Result<Weights, String> {
    build(config, |name, dims| {
        if dims.len() == 1 {
            return Tensor::ones(dims, DType::F32, &Device::Cpu);
        }
        let mut stream = Stream(name.bytes().fold(seed, |h, b| mix(h ^ u64::from(b))));
        // Variance 1 in, variance 1 out; embeddings of variance 1, and logits sharp enough for varied texts.
        let spread = match name {
            "model.embed_tokens.weight" => 3f32.sqrt(),
            "lm_head.weight" => (16.0 * 3.0 / dims[1] as f32).sqrt(),
            _ => (3.0 / dims[1] as f32).sqrt(),
        };
        let mut values: Vec<f32> = (0..dims[0] * dims[1]).map(|_| stream.next() * spread).collect();
        if name == "lm_head.weight" {
            for (token, row) in values.chunks_exact_mut(dims[1]).enumerate() {
                if !(0x20..0x7f).contains(&token) {
                    row.fill(0.0);
                }
            }
        }
        Tensor::from_vec(values, dims, &Device::Cpu)
    })
    .map_err(|e| e.to_string())
}

fn build(config: &Config, mut get: impl FnMut(&str, &[usize]) -> Result<Tensor>) -> Result<Weights> {
    let c = config;
    let (q, kv) = (c.heads * c.head_dim, c.kv_width());
    let embedding = get("model.embed_tokens.weight", &[c.vocab, c.hidden])?;
    let layers = (0..c.layers)
        .map(|i| {
            let mut get = |name: &str, dims: &[usize]| get(&format!("model.layers.{i}.{name}.weight"), dims);
            Ok(Layer {
                input_norm: get("input_layernorm", &[c.hidden])?,
                q: get("self_attn.q_proj", &[q, c.hidden])?,
                k: get("self_attn.k_proj", &[kv, c.hidden])?,
                v: get("self_attn.v_proj", &[kv, c.hidden])?,
                o: get("self_attn.o_proj", &[c.hidden, q])?,
                post_norm: get("post_attention_layernorm", &[c.hidden])?,
                gate: get("mlp.gate_proj", &[c.intermediate, c.hidden])?,
                up: get("mlp.up_proj", &[c.intermediate, c.hidden])?,
                down: get("mlp.down_proj", &[c.hidden, c.intermediate])?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let norm = get("model.norm.weight", &[c.hidden])?;
    let head = if c.tied { embedding.clone() } else { get("lm_head.weight", &[c.vocab, c.hidden])? };
    Ok(Weights { embedding, layers, norm, head })
}

/// Numbers in -1..1 from a counter (splitmix64).
struct Stream(u64);

impl Stream {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.0) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
