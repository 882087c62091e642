//! Metrics in the Prometheus text format.
//!
//! Counters and histograms are counted as things happen; the gauges of the instances are set from the router's view
//! when somebody asks, so an instance that was removed is gone from the next answer.

use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::stats::{Outcome, Timeline};

/// The content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    endpoint: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PlanLabels {
    plan: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabels {
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PrefillerLabels {
    prefiller: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InstanceLabels {
    instance: String,
    role: &'static str,
}

/// Seconds from 1 ms to about 100 s.
#[derive(Clone, Debug)]
struct Seconds;

impl MetricConstructor<Histogram> for Seconds {
    fn new_metric(&self) -> Histogram {
        Histogram::new(exponential_buckets(0.001, 1.8, 21))
    }
}

/// One instance, for its gauges.
#[derive(Clone, Copy, Debug)]
pub struct InstanceGauges<'a> {
    /// Its name.
    pub name: &'a str,
    /// `prefiller` or `decoder`.
    pub role: &'static str,
    /// Its health probe is answered.
    pub up: bool,
    /// It may get requests now: up, breaker closed, not drained.
    pub usable: bool,
    /// Its share of requests.
    pub weight: u32,
    /// Requests under way there.
    pub requests: u32,
    /// Tokens of those.
    pub tokens: u64,
    /// Requests ever sent there.
    pub started: u64,
    /// Requests that failed there.
    pub failed: u64,
}

/// All metrics of one proxy. Cheap to share; every method takes `&self`.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    plans: Family<PlanLabels, Counter>,
    phases: Family<PhaseLabels, Histogram, Seconds>,
    first_token: Histogram,
    ttft: Family<PrefillerLabels, Histogram, Seconds>,
    tokens: Family<KindLabels, Counter>,
    retries: Family<KindLabels, Counter>,
    fallbacks: Family<KindLabels, Counter>,
    notifications: Family<KindLabels, Counter>,
    bad_messages: Family<KindLabels, Counter>,
    kv_bytes: Counter,
    states: Family<StateLabels, Gauge>,
    up: Family<InstanceLabels, Gauge>,
    usable: Family<InstanceLabels, Gauge>,
    weight: Family<InstanceLabels, Gauge>,
    instance_requests: Family<InstanceLabels, Gauge>,
    instance_tokens: Family<InstanceLabels, Gauge>,
    instance_started: Family<InstanceLabels, Gauge>,
    instance_failed: Family<InstanceLabels, Gauge>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// A registry of its own.
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("kvxfer_proxy"),
            requests: Family::default(),
            plans: Family::default(),
            phases: Family::new_with_constructor(Seconds),
            first_token: Seconds.new_metric(),
            ttft: Family::new_with_constructor(Seconds),
            tokens: Family::default(),
            retries: Family::default(),
            fallbacks: Family::default(),
            notifications: Family::default(),
            bad_messages: Family::default(),
            kv_bytes: Counter::default(),
            states: Family::default(),
            up: Family::default(),
            usable: Family::default(),
            weight: Family::default(),
            instance_requests: Family::default(),
            instance_tokens: Family::default(),
            instance_started: Family::default(),
            instance_failed: Family::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let r = &mut self.registry;
        r.register("requests", "Requests that ended, by endpoint and outcome", self.requests.clone());
        r.register("plans", "Prompts by who samples the first token", self.plans.clone());
        let help = "Length of a request's phases; total is the whole of it";
        r.register_with_unit("phase", help, Unit::Seconds, self.phases.clone());
        let help = "Time from a client's request to the first token sent to it";
        r.register_with_unit("first_token", help, Unit::Seconds, self.first_token.clone());
        let help = "Time from a client's request to the prefiller's answer";
        r.register_with_unit("prefiller_ttft", help, Unit::Seconds, self.ttft.clone());
        r.register("tokens", "Tokens of finished requests: prompt and output", self.tokens.clone());
        r.register(
            "retries",
            "Attempts that were repeated elsewhere: prefill and decode",
            self.retries.clone(),
        );
        let help = "Prompts that a decoder computed itself, by reason";
        r.register("fallbacks", help, self.fallbacks.clone());
        r.register(
            "notifications",
            "Notifications about caches, by what they meant",
            self.notifications.clone(),
        );
        let help = "Messages that could not be read, by where they came in";
        r.register("bad_messages", help, self.bad_messages.clone());
        let help = "Bytes of caches moved, as far as notifications say";
        r.register_with_unit("kv", help, Unit::Bytes, self.kv_bytes.clone());
        r.register("in_flight", "Prompts under way, by state", self.states.clone());
        r.register("instance_up", "1 while the instance's health probe is answered", self.up.clone());
        r.register("instance_usable", "1 while the instance may get requests", self.usable.clone());
        r.register("instance_weight", "The instance's share of requests", self.weight.clone());
        r.register("instance_requests", "Requests under way at the instance", self.instance_requests.clone());
        r.register("instance_outstanding_tokens", "Tokens of those requests", self.instance_tokens.clone());
        r.register("instance_started", "Requests ever sent to the instance", self.instance_started.clone());
        r.register("instance_failed", "Requests that failed at the instance", self.instance_failed.clone());
    }

    /// A request has ended.
    pub fn finished(&self, endpoint: &'static str, outcome: Outcome, timeline: &Timeline) {
        self.requests.get_or_create(&RequestLabels { endpoint, outcome: outcome.name() }).inc();
        if outcome == Outcome::Ok {
            for (phase, took) in timeline.phases() {
                self.phases.get_or_create(&PhaseLabels { phase }).observe(took.as_secs_f64());
            }
        }
    }

    /// A prompt has got its plan ([`Plan::name`](crate::openai::Plan::name)).
    pub fn planned(&self, plan: &'static str) {
        self.plans.get_or_create(&PlanLabels { plan }).inc();
    }

    /// A prefiller has answered, that long after the client asked.
    pub fn prefilled(&self, prefiller: &str, took: Duration) {
        self.ttft
            .get_or_create(&PrefillerLabels { prefiller: prefiller.to_owned() })
            .observe(took.as_secs_f64());
    }

    /// The first token has gone to a client, that long after it asked.
    pub fn first_token(&self, took: Duration) {
        self.first_token.observe(took.as_secs_f64());
    }

    /// Tokens of a finished request.
    pub fn tokens(&self, prompt: u64, output: u64) {
        self.tokens.get_or_create(&KindLabels { kind: "prompt" }).inc_by(prompt);
        self.tokens.get_or_create(&KindLabels { kind: "output" }).inc_by(output);
    }

    /// An attempt is repeated elsewhere: `prefill`, `decode`, `tokenize`.
    pub fn retry(&self, kind: &'static str) {
        self.retries.get_or_create(&KindLabels { kind }).inc();
    }

    /// A decoder computes a prompt itself: `kv_timeout`, `kv_failed`, `prefill_failed`, `no_prefiller`, …
    pub fn fallback(&self, kind: &'static str) {
        self.fallbacks.get_or_create(&KindLabels { kind }).inc();
    }

    /// A notification came: `ready`, `progress`, `failed`, `duplicate`, `late`, `unknown`, …
    pub fn notification(&self, kind: &'static str) {
        self.notifications.get_or_create(&KindLabels { kind }).inc();
    }

    /// A message that cannot be read came: `zmq`, `telemetry`, …
    pub fn bad_message(&self, kind: &'static str) {
        self.bad_messages.get_or_create(&KindLabels { kind }).inc();
    }

    /// A cache has arrived, of that many bytes.
    pub fn kv_bytes(&self, bytes: u64) {
        self.kv_bytes.inc_by(bytes);
    }

    /// The text for `GET /metrics`. `states` are numbers of prompts by state (`queued`, `prefill`, …).
    pub fn encode<'a>(
        &self,
        states: &[(&'static str, usize)],
        instances: impl IntoIterator<Item = InstanceGauges<'a>>,
    ) -> String {
        for (state, number) in states {
            self.states.get_or_create(&StateLabels { state }).set(*number as i64);
        }
        let families = [
            &self.up,
            &self.usable,
            &self.weight,
            &self.instance_requests,
            &self.instance_tokens,
            &self.instance_started,
            &self.instance_failed,
        ];
        for family in families {
            family.clear();
        }
        for instance in instances {
            let labels = InstanceLabels { instance: instance.name.to_owned(), role: instance.role };
            let values = [
                i64::from(instance.up),
                i64::from(instance.usable),
                i64::from(instance.weight),
                i64::from(instance.requests),
                instance.tokens as i64,
                instance.started as i64,
                instance.failed as i64,
            ];
            for (family, value) in families.iter().zip(values) {
                family.get_or_create(&labels).set(value);
            }
        }
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = text::encode(&mut out, &self.registry);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Mark;
    use kvxfer_proto::Time;

    #[test]
    fn what_is_counted_is_told_and_removed_instances_are_gone() {
        let metrics = Metrics::new();
        let mut timeline = Timeline::new(Time(0));
        timeline.mark(Mark::Prefilled, Time(5_000_000));
        timeline.mark(Mark::Finished, Time(9_000_000));
        metrics.finished("/v1/completions", Outcome::Ok, &timeline);
        metrics.finished("/v1/completions", Outcome::Busy, &timeline);
        metrics.prefilled("prefiller1", Duration::from_millis(5));
        metrics.retry("prefill");
        metrics.fallback("kv_timeout");
        metrics.notification("ready");
        metrics.bad_message("zmq");
        metrics.tokens(10, 3);
        metrics.kv_bytes(77);
        let instance = InstanceGauges {
            name: "decoder\"1",
            role: "decoder",
            up: true,
            usable: false,
            weight: 2,
            requests: 3,
            tokens: 40,
            started: 50,
            failed: 6,
        };
        let text = metrics.encode(&[("queued", 4)], [instance]);
        for line in [
            "kvxfer_proxy_requests_total{endpoint=\"/v1/completions\",outcome=\"ok\"} 1",
            "kvxfer_proxy_requests_total{endpoint=\"/v1/completions\",outcome=\"busy\"} 1",
            "kvxfer_proxy_phase_seconds_count{phase=\"total\"} 1",
            "kvxfer_proxy_phase_seconds_sum{phase=\"prefill\"} 0.005",
            "kvxfer_proxy_prefiller_ttft_seconds_count{prefiller=\"prefiller1\"} 1",
            "kvxfer_proxy_retries_total{kind=\"prefill\"} 1",
            "kvxfer_proxy_fallbacks_total{kind=\"kv_timeout\"} 1",
            "kvxfer_proxy_notifications_total{kind=\"ready\"} 1",
            "kvxfer_proxy_bad_messages_total{kind=\"zmq\"} 1",
            "kvxfer_proxy_tokens_total{kind=\"output\"} 3",
            "kvxfer_proxy_kv_bytes_total 77",
            "kvxfer_proxy_in_flight{state=\"queued\"} 4",
            "kvxfer_proxy_instance_usable{instance=\"decoder\\\"1\",role=\"decoder\"} 0",
            "kvxfer_proxy_instance_outstanding_tokens{instance=\"decoder\\\"1\",role=\"decoder\"} 40",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
        let text = metrics.encode(&[("queued", 0)], []);
        assert!(!text.contains("instance_up{"), "{text}");
        assert!(text.contains("kvxfer_proxy_in_flight{state=\"queued\"} 0"));
        assert!(text.ends_with("# EOF\n"));
    }
}
