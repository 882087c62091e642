//! A small Llama engine on the CPU whose prefillers hand their KV cache to its decoders through `kvxfer`.
fn main() {}
