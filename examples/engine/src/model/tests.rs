//! What a token's result may depend on.

use super::{Cache, Config, Model, Piece, Rope, Setup, exp, pack, softmax, unpack};

fn model(threads: usize) -> Model {
    let config = Config {
        hidden: 64,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        intermediate: 96,
        vocab: 131,
        eps: 1e-6,
        rope: Rope { theta: 10_000.0, llama3: None },
        positions: 256,
        tied: false,
        eos: Vec::new(),
    };
    Model::random(config, 7, Setup { positions: 256, chunk_tokens: 32, threads }).unwrap()
}

fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 7919 + seed * 104_729 + i * i) % 131).collect()
}

/// Logits of the last token after feeding `tokens` in pieces of the given sizes.
fn last(model: &Model, tokens: &[u32], sizes: &[usize]) -> (Vec<f32>, Cache) {
    let mut cache = Cache::new(model.shape());
    let (mut done, mut logits) = (0, Vec::new());
    for size in sizes.iter().copied().chain(std::iter::once(usize::MAX)) {
        let n = size.min(tokens.len() - done);
        if n == 0 {
            break;
        }
        let piece =
            Piece { tokens: &tokens[done..done + n], start: done, cache: &mut cache, logits_from: n - 1 };
        logits = model.forward(&mut [piece]).unwrap().remove(0).remove(0);
        done += n;
    }
    (logits, cache)
}

fn bytes(cache: &Cache, chunk: usize, tokens: usize) -> Vec<u8> {
    let mut all = Vec::new();
    pack(&cache.chunk(chunk).unwrap(), tokens, |at, bytes| {
        assert_eq!(at as usize, all.len());
        all.extend_from_slice(bytes);
        Ok(())
    })
    .unwrap();
    all
}

#[test]
fn pieces_do_not_matter() {
    let model = model(1);
    let tokens = prompt(1, 101);
    let (whole, cache) = last(&model, &tokens, &[]);
    for sizes in [&[1; 100][..], &[64][..], &[100][..], &[3, 17, 31, 1, 1][..]] {
        let (other, other_cache) = last(&model, &tokens, sizes);
        assert_eq!(whole, other, "pieces {sizes:?}");
        for chunk in 0..4 {
            let valid = model.shape().valid(chunk, 101);
            assert_eq!(bytes(&cache, chunk, valid), bytes(&other_cache, chunk, valid), "chunk {chunk}");
        }
    }
}

#[test]
fn company_does_not_matter() {
    let model = model(1);
    let prompts: Vec<_> = (0..21).map(|i| prompt(i, 5 + 7 * i as usize % 60)).collect();
    let alone: Vec<_> = prompts.iter().map(|p| last(&model, p, &[]).0).collect();
    for order in [1, 2, 5] {
        let mut caches: Vec<_> = prompts.iter().map(|_| Cache::new(model.shape())).collect();
        let mut pieces: Vec<_> = prompts
            .iter()
            .zip(&mut caches)
            .map(|(p, cache)| Piece { tokens: p, start: 0, cache, logits_from: p.len() - 1 })
            .collect();
        pieces.rotate_left(order);
        let together = model.forward(&mut pieces).unwrap();
        for (i, logits) in together.iter().enumerate() {
            let of = (i + order) % prompts.len();
            assert_eq!(logits[0], alone[of], "prompt {of} at place {i}");
        }
    }
}

#[test]
fn threads_do_not_matter() {
    let tokens = prompt(3, 150);
    assert_eq!(last(&model(1), &tokens, &[]).0, last(&model(3), &tokens, &[40]).0);
}

#[test]
fn a_packed_cache_goes_on_where_the_first_stopped() {
    let model = model(1);
    let tokens = prompt(4, 90);
    let (_, cache) = last(&model, &tokens[..89], &[]);
    let expected = last(&model, &tokens, &[89]).0;
    for zeroed in [false, true] {
        let mut received = Cache::new(model.shape());
        for chunk in 0..3 {
            let valid = model.shape().valid(chunk, 89);
            let packed = bytes(&cache, chunk, valid);
            assert_eq!(packed.len(), model.shape().bytes(valid));
            let tensor = unpack(model.shape(), valid, |out| {
                if !zeroed {
                    out.copy_from_slice(&packed);
                }
                Ok::<_, ()>(())
            });
            received.push(tensor.unwrap().unwrap());
        }
        let piece = Piece { tokens: &tokens[89..], start: 89, cache: &mut received, logits_from: 0 };
        let logits = model.forward(&mut [piece]).unwrap().remove(0).remove(0);
        assert_eq!(logits == expected, !zeroed, "the comparison must notice a cache of zeros");
    }
}

#[test]
fn a_fork_shares_what_is_full_and_copies_the_rest() {
    let model = model(1);
    let tokens = prompt(5, 40);
    let (_, mut first) = last(&model, &tokens, &[]);
    let mut second = first.fork(40).unwrap();
    let next = |cache: &mut Cache, token: u32| {
        let piece = Piece { tokens: &[token], start: 40, cache, logits_from: 0 };
        model.forward(&mut [piece]).unwrap().remove(0).remove(0)
    };
    let (a, b) = (next(&mut first, 9), next(&mut second, 10));
    assert_ne!(a, b);
    assert_eq!(next(&mut first, 9), a, "the fork's token has not touched the first");
}

#[test]
fn the_fast_exponential_is_one() {
    for i in 0..=870_000u32 {
        let x = -(i as f32) * 1e-4;
        let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
        assert!((found - expected).abs() <= 2.5e-7 * expected, "e^{x} is {expected}, not {found}");
    }
    assert_eq!(exp(0.0).to_bits(), 1f32.to_bits());
    assert!(exp(-1000.0) < 1e-37);
    let mut row: Vec<f32> = (0..37).map(|i| (i * 7 % 11) as f32).collect();
    softmax(&mut row);
    assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    assert!((row[3] / row[0] - 10f32.exp()).abs() < 0.02 * 10f32.exp());
}
