//! A model from a Hugging Face folder, made here: safetensors, `config.json`, `tokenizer.json`, a chat template.

use crate::harness::{Instance, Pull, ids};
use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

const VOCAB: usize = 300;

fn tensor(seed: usize, dims: &[usize]) -> Tensor {
    let n = dims.iter().product::<usize>();
    let scale = (3.0 / dims[dims.len() - 1] as f32).sqrt();
    let values: Vec<f32> = if dims.len() == 1 {
        vec![1.0; n]
    } else {
        (0..n)
            .map(|i| {
                let mixed = ((i + 1) * (2 * seed + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                ((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / 8_388_608.0 - 1.0
            })
            .map(|v| v * scale)
            .collect()
    };
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn make(folder: &Path) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "hidden_act": "silu", "tie_word_embeddings": true, "eos_token_id": [298, 299],
        "rope_theta": 500_000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128},
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut tensors = HashMap::from([
        ("model.embed_tokens.weight".to_owned(), tensor(1, &[VOCAB, 64])),
        ("model.norm.weight".to_owned(), tensor(2, &[64])),
    ]);
    for layer in 0..2 {
        for (i, (name, dims)) in [
            ("input_layernorm", &[64][..]),
            ("self_attn.q_proj", &[64, 64]),
            ("self_attn.k_proj", &[32, 64]),
            ("self_attn.v_proj", &[32, 64]),
            ("self_attn.o_proj", &[64, 64]),
            ("post_attention_layernorm", &[64]),
            ("mlp.gate_proj", &[96, 64]),
            ("mlp.up_proj", &[96, 64]),
            ("mlp.down_proj", &[64, 96]),
        ]
        .into_iter()
        .enumerate()
        {
            tensors.insert(format!("model.layers.{layer}.{name}.weight"), tensor(10 * layer + i + 5, dims));
        }
    }
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    // One token per word of a small vocabulary.
    let words = ["user", "assistant", "a", "story", "about", "the", "sea", ":", "<s>", "</s>"];
    let mut vocab: Value = words
        .iter()
        .enumerate()
        .map(|(i, w)| ((*w).to_owned(), json!(i)))
        .collect::<serde_json::Map<_, _>>()
        .into();
    for i in words.len()..VOCAB {
        vocab[format!("w{i}")] = i.into();
    }
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "decoder": null,
        "added_tokens": [
            {"id": 8, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
        ],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"},
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let template = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n{{ m['role'].strip() }} : {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}";
    let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": template});
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
}

#[test]
fn a_pair_that_serves_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path());
    let path = folder.path().to_str().unwrap();
    let start =
        |args: &[&str]| Instance::start_model(&[&["--model", path, "--threads", "1"], args].concat(), &[]);
    let proxy = Pull::bind();
    let (single, decoder) = (start(&[]), start(&["--role", "decode", "--kv-port", "0"]));
    let prefiller = start(&["--role", "prefill", "--proxy-port", &proxy.port.to_string()]);

    let chat = json!({"messages": [{"role": "user", "content": "a story about the sea"}]});
    let tokens = ids(&single.post("/tokenize", &chat)["tokens"]);
    assert_eq!(tokens, [8, 0, 7, 2, 3, 4, 5, 6, 1, 7], "through the folder's template and tokenizer");
    let (status, message) = single.refuse("/tokenize", r#"{"messages": [{"role": "tool", "content": "x"}]}"#);
    assert!(status == 400 && message.contains("no tools"), "{message}");

    for len in [10, 256, 300] {
        let prompt: Vec<u32> =
            tokens.iter().copied().cycle().take(len).enumerate().map(|(i, t)| (t + i as u32) % 290).collect();
        let more = json!({"ignore_eos": true});
        let expected = single.tokens(&prompt, 16, &more);
        let first = prefiller.prefill(&prompt, &format!("r{len}"), decoder.kv_port, &more);
        proxy.ready(&format!("r{len}"));
        let rest = decoder.tokens(&[&prompt[..], &[first]].concat(), 15, &more);
        assert_eq!([vec![first], rest].concat(), expected, "{len} tokens");
    }
    decoder.wait_log("Retrieved 300 of 301 tokens");
}

#[test]
fn folders_that_are_no_model() {
    let folder = tempfile::tempdir().unwrap();
    let run = || {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_kvxfer-engine"))
            .args(["--port", "0", "--model"])
            .arg(folder.path())
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(run().contains("config.json"), "{}", run());
    make(folder.path());
    std::fs::write(folder.path().join("model.safetensors"), "nothing").unwrap();
    assert!(run().contains("model.safetensors"), "{}", run());
    std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    assert!(run().contains("no *.safetensors"), "{}", run());
    std::fs::write(folder.path().join("config.json"), r#"{"architectures": ["BertModel"], "hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 1, "vocab_size": 1}"#).unwrap();
    assert!(run().contains("BertModel"), "{}", run());
}
