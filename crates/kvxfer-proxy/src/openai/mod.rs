//! The `OpenAI` face: requests taken apart and built, answers joined.
