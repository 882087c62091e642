//! A decorator that injects faults into any transport: delay, drop, failure after N, duplication, stall, corruption.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What goes wrong, and when. Counts are per link.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FaultPlan {
    /// Every job starts this much later.
    #[serde(with = "humantime_serde")]
    pub delay: Duration,
    /// The job after this many never completes by itself (it can be cancelled).
    pub stall_after: Option<u64>,
    /// Jobs after this many fail with [`kvxfer_proto::ErrorCode::Transport`].
    pub fail_after: Option<u64>,
    /// Within a failing job, pieces before this one still move.
    pub fail_at_piece: usize,
    /// Every n-th job is submitted twice underneath.
    pub duplicate_every: Option<u64>,
    /// In every n-th write job one byte arrives flipped.
    pub corrupt_every: Option<u64>,
    /// Every n-th job claims success without moving a byte.
    pub drop_every: Option<u64>,
}
