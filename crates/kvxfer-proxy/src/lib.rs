//! The disaggregated-prefill proxy: one OpenAI endpoint in front of prefillers and decoders.
