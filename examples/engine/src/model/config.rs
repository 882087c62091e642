//! What a Llama is made of: read from a Hugging Face `config.json`, or from the command line for random weights.

use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

/// The shape of a Llama and the numbers its forward pass needs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) intermediate: usize,
    pub(crate) vocab: usize,
    pub(crate) eps: f64,
    pub(crate) rope: Rope,
    /// Longest sequence the model was made for.
    pub(crate) positions: usize,
    /// The output layer is the embedding.
    pub(crate) tied: bool,
    /// Tokens that end a text.
    pub(crate) eos: Vec<u32>,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rope {
    pub(crate) theta: f64,
    pub(crate) llama3: Option<Llama3>,
}

/// Llama 3.1's stretching of the low frequencies.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(crate) struct Llama3 {
    pub(crate) factor: f64,
    pub(crate) low_freq_factor: f64,
    pub(crate) high_freq_factor: f64,
    pub(crate) original_max_position_embeddings: f64,
}

/// The keys of `config.json` that matter here.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    architectures: Vec<String>,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    vocab_size: usize,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    #[serde(default = "default_positions")]
    max_position_embeddings: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    #[serde(default = "default_act")]
    hidden_act: String,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

fn default_eps() -> f64 {
    1e-6
}
fn default_positions() -> usize {
    2048
}
fn default_act() -> String {
    "silu".into()
}

impl Config {
    /// Reads `config.json` (and the end tokens of `generation_config.json`) of a model's folder.
    pub(crate) fn from_folder(folder: &Path) -> Result<Self, String> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| {
            format!("cannot read {}: {e}; --model takes a local Hugging Face folder", path.display())
        })?;
        let file: File = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut config = file.into_config().map_err(|e| format!("{}: {e}", path.display()))?;
        if let Ok(text) = std::fs::read_to_string(folder.join("generation_config.json"))
            && let Ok(value) = serde_json::from_str::<Value>(&text)
            && let Some(more) = value.get("eos_token_id").cloned()
            && let Ok(more) = serde_json::from_value::<OneOrMany>(more)
        {
            config.eos.extend(more.into_vec());
            config.eos.sort_unstable();
            config.eos.dedup();
        }
        Ok(config)
    }

    /// Elements of one token's keys (or values) in one layer.
    pub(crate) fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Everything the forward pass divides by or relies on.
    pub(crate) fn check(&self) -> Result<(), String> {
        let sizes = [
            ("hidden size", self.hidden),
            ("layers", self.layers),
            ("attention heads", self.heads),
            ("key/value heads", self.kv_heads),
            ("head dimension", self.head_dim),
            ("intermediate size", self.intermediate),
            ("vocabulary", self.vocab),
            ("longest sequence", self.positions),
        ];
        if let Some((what, n)) = sizes.into_iter().find(|(_, n)| *n == 0 || *n > 1 << 24) {
            return Err(format!("{what} is {n}; it must be 1 to {}", 1 << 24));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!(
                "{} attention heads cannot share {} key/value heads",
                self.heads, self.kv_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("head dimension {} is odd; rotary embedding needs pairs", self.head_dim));
        }
        Ok(())
    }
}

impl OneOrMany {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(n) => vec![n],
            Self::Many(n) => n,
        }
    }
}

impl File {
    fn into_config(self) -> Result<Config, String> {
        if !self.architectures.is_empty() && !self.architectures.iter().any(|a| a == "LlamaForCausalLM") {
            return Err(format!(
                "architecture {:?}; this engine runs LlamaForCausalLM only",
                self.architectures
            ));
        }
        if self.hidden_act != "silu" {
            return Err(format!("hidden_act {:?}; only \"silu\" is known", self.hidden_act));
        }
        if self.attention_bias || self.mlp_bias {
            return Err("attention_bias or mlp_bias is true; only layers without bias are known".into());
        }
        if self.num_attention_heads == 0 {
            return Err("num_attention_heads is 0".into());
        }
        let rope = rope(self.rope_theta, self.rope_scaling.as_ref(), self.rope_parameters.as_ref())?;
        let config = Config {
            hidden: self.hidden_size,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim: self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads),
            intermediate: self.intermediate_size,
            vocab: self.vocab_size,
            eps: self.rms_norm_eps,
            rope,
            positions: self.max_position_embeddings,
            tied: self.tie_word_embeddings,
            eos: self.eos_token_id.map(OneOrMany::into_vec).unwrap_or_default(),
        };
        config.check()?;
        Ok(config)
    }
}

/// Both spellings: `rope_theta` with `rope_scaling`, and the later `rope_parameters`.
fn rope(theta: Option<f64>, scaling: Option<&Value>, parameters: Option<&Value>) -> Result<Rope, String> {
    let given = parameters.or(scaling).filter(|v| !v.is_null());
    let inner = given.and_then(|v| v.get("rope_theta")).and_then(Value::as_f64);
    let theta = inner.or(theta).unwrap_or(10_000.0);
    let kind = given.and_then(|v| v.get("rope_type").or_else(|| v.get("type"))).and_then(Value::as_str);
    let llama3 = match (kind, given) {
        (None | Some("default"), _) | (_, None) => None,
        (Some("llama3"), Some(v)) => {
            Some(serde_json::from_value(v.clone()).map_err(|e| format!("rope of type llama3: {e}"))?)
        }
        (Some(other), _) => return Err(format!("rope type {other:?}; known are \"default\" and \"llama3\"")),
    };
    Ok(Rope { theta, llama3 })
}
