//! Time-to-first-token statistics and the timeline of a request.
