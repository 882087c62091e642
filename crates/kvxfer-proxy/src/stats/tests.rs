//! Statistics under a clock of the test's own.

use std::time::Duration;

use kvxfer_proto::Time;
use serde_json::{Value, json};

use super::{Mark, Outcome, Stats, Timeline};

fn at(ms: u64) -> Time {
    Time(Duration::from_millis(ms).as_nanos() as u64)
}

fn ms(ms: f64) -> Duration {
    Duration::from_secs_f64(ms / 1e3)
}

#[test]
fn the_table_is_the_guides() {
    let stats = Stats::new(at(0), Duration::from_secs(5));
    stats.add_prefiller("p1");
    stats.add_prefiller("p2");
    for took in [40.0, 40.1, 46.8] {
        stats.prefilled(at(10), "p1", ms(took));
    }
    stats.prefilled(at(10), "p2", ms(123.5));
    assert_eq!(
        stats.report(at(10)).expect("something is new"),
        "===============================\n\
         Num requests: 4\n\
         Prefiller 1 TTFT stats:\n \
         - Average (ms): 42.3\n \
         - Median (ms): 40.1\n \
         - 99th Percentile (ms): 46.8\n\
         Prefiller 2 TTFT stats:\n \
         - Average (ms): 123.5\n \
         - Median (ms): 123.5\n \
         - 99th Percentile (ms): 123.5\n\
         ==============================="
    );
}

#[test]
fn reports_come_seldom_and_only_with_news() {
    let stats = Stats::new(at(0), Duration::from_secs(5));
    assert_eq!(stats.report(at(60_000)), None, "nothing has happened");
    assert_eq!(stats.last_report(), None);
    stats.prefilled(at(60_000), "p", ms(1.0));
    assert!(stats.report(at(60_000)).is_some());
    stats.prefilled(at(61_000), "p", ms(1.0));
    assert_eq!(stats.report(at(64_999)), None, "too early");
    assert!(stats.report(at(65_000)).expect("time is up").contains("Num requests: 2"));
    assert_eq!(stats.report(at(99_000)), None, "nothing new");
    assert!(stats.last_report().is_some());
}

#[test]
fn percentiles_of_many() {
    let stats = Stats::new(at(0), Duration::from_secs(5));
    for i in 1..=1000u32 {
        stats.prefilled(at(u64::from(i)), "p", ms(f64::from(i)));
    }
    let snapshot: Value =
        serde_json::from_slice(&stats.snapshot(at(1000), 7, &json!({"queued": 3}))).expect("json");
    let ttft = &snapshot["ttft"][0];
    let near = |value: &Value, expected: f64| {
        let value = value.as_f64().expect("a number");
        assert!((value - expected).abs() <= expected * 2e-3, "{value} for {expected}");
    };
    near(&ttft["mean_ms"], 500.5);
    near(&ttft["p50_ms"], 500.0);
    near(&ttft["p99_ms"], 990.0);
    near(&ttft["max_ms"], 1000.0);
    assert_eq!(
        (&ttft["count"], &snapshot["queued"], &snapshot["unix_ms"]),
        (&json!(1000), &json!(3), &json!(7))
    );
    assert_eq!(ttft["recent"].as_array().map(Vec::len), Some(1), "within two seconds: one point");
    assert_eq!(ttft["recent"][0][1], 1000);
}

#[test]
fn charts_forget_after_five_minutes() {
    let stats = Stats::new(at(0), Duration::from_secs(5));
    stats.prefilled(at(1_000), "p", ms(10.0));
    stats.prefilled(at(1_500), "p", ms(30.0));
    stats.prefilled(at(200_000), "p", ms(5.0));
    let recent = |now| {
        let snapshot: Value = serde_json::from_slice(&stats.snapshot(now, 0, &json!({}))).expect("json");
        snapshot["ttft"][0]["recent"].clone()
    };
    assert_eq!(recent(at(200_000)), json!([[200, 2, 20.0, 30.0], [0, 1, 5.0, 5.0]]));
    assert_eq!(recent(at(301_000)), json!([[100, 1, 5.0, 5.0]]));
}

#[test]
fn a_timeline_divides_the_total() {
    let mut timeline = Timeline::new(at(100));
    timeline.mark(Mark::Admitted, at(101));
    timeline.mark(Mark::Routed, at(103));
    timeline.mark(Mark::Prefilled, at(143));
    timeline.mark(Mark::Prefilled, at(999));
    timeline.mark(Mark::KvReady, at(150));
    assert_eq!(timeline.header(), "queue;dur=1.000, route;dur=2.000, prefill;dur=40.000, kv_wait;dur=7.000");
    timeline.mark(Mark::FirstDecoded, at(160));
    timeline.mark(Mark::Finished, at(200));
    assert_eq!(
        timeline.to_string(),
        "queue=1.0ms route=2.0ms prefill=40.0ms kv_wait=7.0ms first_decode=10.0ms rest=40.0ms total=100.0ms"
    );
    let sum: Duration = timeline.phases().filter(|(name, _)| *name != "total").map(|(_, took)| took).sum();
    assert_eq!(Some(sum), timeline.until(Mark::Finished));
    assert_eq!(timeline.until(Mark::Prefilled), Some(ms(43.0)));

    let mut short = Timeline::new(at(0));
    short.mark(Mark::Admitted, at(2));
    short.mark(Mark::FirstDecoded, at(5));
    assert_eq!(
        short.to_string(),
        "queue=2.0ms first_decode=3.0ms",
        "phases that did not take place are left out"
    );
}

#[test]
fn a_row_is_on_the_board_as_long_as_its_request() {
    let stats = Stats::new(at(0), Duration::from_secs(5));
    let row = stats.board().add(at(10), "cmpl-1", "/v1/completions", true);
    row.planned(12, "first_token");
    row.assigned(Some("prefiller1"), Some("decoder1"));
    row.phase(at(30), "prefill");
    row.output_tokens(4);
    let snapshot: Value = serde_json::from_slice(&stats.snapshot(at(50), 0, &json!({}))).expect("json");
    assert_eq!(
        snapshot["in_flight"],
        json!([{"id": "cmpl-1", "endpoint": "/v1/completions", "stream": true, "age_ms": 40, "phase": "prefill",
            "phase_ms": 20, "plan": "first_token", "prompt_tokens": 12, "output_tokens": 4,
            "prefiller": "prefiller1", "decoder": "decoder1"}])
    );
    assert_eq!(stats.board().len(), 1);
    drop(row);
    assert!(stats.board().is_empty());
}

#[test]
fn outcomes_are_counted_by_name() {
    let stats = Stats::new(at(0), Duration::from_secs(5));
    let mut timeline = Timeline::new(at(0));
    timeline.mark(Mark::Finished, at(9));
    for status in [200, 400, 404, 503, 500, 502] {
        stats.finished(at(9), Outcome::of_status(status), &timeline, 2);
    }
    stats.finished(at(9), Outcome::Cancelled, &timeline, 0);
    let snapshot: Value = serde_json::from_slice(&stats.snapshot(at(9), 0, &json!({}))).expect("json");
    assert_eq!(snapshot["requests"], json!({"ok": 1, "refused": 2, "busy": 1, "failed": 2, "cancelled": 1}));
    assert_eq!(snapshot["output_tokens"], 12);
    assert_eq!(snapshot["phases"]["total"]["count"], 1, "phases are those of good answers");
}
