//! Flags and files: what they come to, and that whatever is wrong is named with its remedy.

use kvxfer_proxy::config::{File, Instance, KvPath, Policy};
use kvxfer_proxy::{Config, Flags};
use std::time::Duration;

fn places(config: &Config) -> (Vec<String>, Vec<String>) {
    let list = |all: &[Instance]| all.iter().map(|i| format!("{} {}", i.name, i.authority())).collect();
    (list(&config.prefillers), list(&config.decoders))
}

fn load(flags: &Flags, yaml: &str) -> Result<Config, String> {
    let file = File::parse(yaml)?;
    let config = flags.onto(file).map_err(|e| e.to_string())?;
    config.check().map_err(|e| e.to_string())?;
    Ok(config)
}

fn strings(all: &[&str]) -> Vec<String> {
    all.iter().map(|&s| s.to_owned()).collect()
}

#[test]
fn nothing_said_is_what_lmcaches_proxy_takes() {
    let config = load(&Flags::default(), "").expect("valid");
    assert_eq!(
        (config.listen.to_string(), config.notify.to_string()),
        ("localhost:8000".into(), "localhost:8500".into())
    );
    let (prefillers, decoders) = places(&config);
    assert_eq!(
        (prefillers, decoders),
        (strings(&["prefiller1 localhost:8100"]), strings(&["decoder1 localhost:8200"]))
    );
    let receiver = &config.decoders[0].receiver;
    assert_eq!((receiver.init_ports.as_slice(), receiver.alloc_ports.as_slice()), (&[8300][..], &[8400][..]));
}

#[test]
fn hosts_ports_and_counts_pair_as_in_lmcaches_proxy() {
    let hosts = |given: &[&str], ports: &[u16], count: Option<usize>| {
        let flags = Flags {
            prefiller_hosts: strings(given),
            prefiller_ports: ports.to_vec(),
            num_prefillers: count,
            ..Flags::default()
        };
        load(&flags, "").map(|config| config.prefillers.iter().map(Instance::authority).collect::<Vec<_>>())
    };
    assert_eq!(
        hosts(&[], &[8100], Some(3)),
        Ok(strings(&["localhost:8100", "localhost:8101", "localhost:8102"]))
    );
    assert_eq!(hosts(&["a"], &[1, 5], None), Ok(strings(&["a:1", "a:5"])));
    assert_eq!(hosts(&["a", "b"], &[7], Some(2)), Ok(strings(&["a:7", "b:7"])));
    assert_eq!(hosts(&["a", "b"], &[7, 8], None), Ok(strings(&["a:7", "b:8"])));
    assert_eq!(hosts(&["::1"], &[7], None), Ok(strings(&["[::1]:7"])));
    for (given, says) in [
        (hosts(&["a", "b"], &[1, 2, 3], None), "--prefiller-port: 3 ports for 2 hosts"),
        (hosts(&[], &[1, 2], Some(3)), "--num-prefillers: 3"),
        (hosts(&[], &[65_535], Some(2)), "the last port would be 65536"),
        (hosts(&[], &[1], Some(0)), "--num-prefillers: 0"),
        (hosts(&[], &[0], None), "prefiller1.port: 0"),
        (hosts(&["http://a"], &[1], None), "prefiller1.host: http://a: give the host alone"),
        (hosts(&["a b"], &[1], None), "this is no host name"),
        (hosts(&["a"], &[1, 1], None), "this address is listed twice"),
    ] {
        let problem = given.expect_err(says);
        assert!(problem.contains(says), "{problem} should say {says}");
    }
}

#[test]
fn every_decoder_gets_its_ranks_ports() {
    let ranks = |hosts: &[&str], ports: &[u16], init: &[u16], alloc: &[u16], count: Option<usize>| {
        let flags = Flags {
            decoder_hosts: strings(hosts),
            decoder_ports: ports.to_vec(),
            decoder_init_ports: init.to_vec(),
            decoder_alloc_ports: alloc.to_vec(),
            num_decoders: count,
            ..Flags::default()
        };
        load(&flags, "").map(|config| {
            config
                .decoders
                .iter()
                .map(|d| (d.receiver.init_ports.clone(), d.receiver.alloc_ports.clone()))
                .collect::<Vec<_>>()
        })
    };
    // One decoder, two ranks.
    assert_eq!(ranks(&[], &[], &[1, 2], &[3, 4], None), Ok(vec![(vec![1, 2], vec![3, 4])]));
    // Two on one host: the next ports.
    assert_eq!(
        ranks(&[], &[8200], &[10], &[20], Some(2)),
        Ok(vec![(vec![10], vec![20]), (vec![11], vec![21])])
    );
    // Two on one host with a list for both: each its part.
    assert_eq!(
        ranks(&[], &[1, 2], &[10, 11, 12, 13], &[20, 21, 22, 23], None),
        Ok(vec![(vec![10, 11], vec![20, 21]), (vec![12, 13], vec![22, 23])])
    );
    // Two hosts: the same ports on both.
    assert_eq!(
        ranks(&["a", "b"], &[1], &[10, 11], &[20, 21], None),
        Ok(vec![(vec![10, 11], vec![20, 21]); 2])
    );
    for (given, says) in [
        (ranks(&[], &[1, 2], &[10, 11, 12], &[1], None), "--decoder-init-port: [10, 11, 12]"),
        (ranks(&[], &[1], &[10, 11], &[20], None), "decoder1.alloc_ports: [20]"),
        (ranks(&[], &[1], &[10], &[10], None), "each is 1 to 65535 and used once"),
    ] {
        let problem = given.expect_err(says);
        assert!(problem.contains(says), "{problem} should say {says}");
    }
}

const FILE: &str = "
host: 0.0.0.0
port: 9000
proxy_port: 7500
policy: {prefill: prefix-affinity, decode: least-tokens, chunk_tokens: 256, chunks: 2}
prefillers:
  - {host: gpu1, port: 8100, weight: 2}
  - {name: small, host: gpu2, port: 8100, max_requests: 4}
decoders:
  - host: gpu3
    port: 8200
    receiver_host: 10.0.0.3
    init_ports: [8300, 8301]
    alloc_ports: [8400, 8401]
limits: {requests: 100, queue_wait: 5s}
deadlines: {kv: 2s 500ms}
health: {interval: 1s}
api_keys: [sk-one]
admin_token: sesame
access_log: false
stats_interval: 10s
";

#[test]
fn a_file_says_more_and_flags_win() {
    let config = load(&Flags::default(), FILE).expect("valid");
    assert_eq!(config.listen.to_string(), "0.0.0.0:9000");
    let (prefillers, _) = places(&config);
    assert_eq!(prefillers, strings(&["prefiller1 gpu1:8100", "small gpu2:8100"]));
    assert_eq!((config.prefillers[0].weight, config.prefillers[1].max_requests), (2, Some(4)));
    assert_eq!((config.decoders[0].tp_ranks(), config.decoders[0].receiver.host.as_str()), (2, "10.0.0.3"));
    let settings = &config.settings;
    assert_eq!(
        (settings.policy.prefill, settings.policy.decode),
        (Policy::PrefixAffinity, Policy::LeastTokens)
    );
    assert_eq!((settings.limits.requests, settings.deadlines.kv), (100, Duration::from_millis(2500)));
    assert!(!settings.access_log.0 && settings.kv == KvPath::Pd);
    // Secrets are compared, never shown.
    assert!(settings.api_keys[0].matches(b"sk-one") && !settings.api_keys[0].matches(b"sk-two"));
    assert!(!format!("{config:?}").contains("sesame"));

    let flags = Flags {
        port: Some(9100),
        prefiller_ports: vec![7100],
        policy: Some(Policy::RoundRobin),
        kv_timeout: Some(Duration::from_secs(1)),
        api_keys: strings(&["sk-flag"]),
        ..Flags::default()
    };
    let config = load(&flags, FILE).expect("valid");
    assert_eq!(config.listen.port, 9100);
    assert_eq!(places(&config).0, strings(&["prefiller1 localhost:7100"]));
    assert_eq!(config.decoders.len(), 1, "decoders are still the file's");
    assert_eq!(
        (config.settings.policy.decode, config.settings.deadlines.kv),
        (Policy::RoundRobin, Duration::from_secs(1))
    );
    assert!(config.settings.api_keys[0].matches(b"sk-flag"));
}

#[test]
fn a_wrong_file_is_told_where() {
    let good = FILE;
    for (bad, says) in [
        (good.replace("port: 9000", "prot: 9000"), "prot"),
        (good.replace("weight: 2", "wheight: 2"), "wheight"),
        (good.replace("weight: 2", "weight: 0"), "prefiller1.weight: 0"),
        (good.replace("max_requests: 4", "max_requests: 0"), "small.max_requests"),
        (good.replace("port: 9000", "port: 90000"), "90000"),
        (good.replace("kv: 2s 500ms", "kv: soon"), "kv"),
        (good.replace("kv: 2s 500ms", "kv: 0s"), "deadlines.kv"),
        (good.replace("prefix-affinity", "lucky"), "unknown variant `lucky`"),
        (good.replace("policy: {", "policy: lucky #"), "policy: lucky: use round-robin"),
        (good.replace("init_ports: [8300, 8301]", "init_ports: [x]"), "a port is a number"),
        (
            good.replace("init_ports: [8300, 8301]", "init_ports: []")
                .replace("alloc_ports: [8400, 8401]", ""),
            "decoder1.init_ports: none",
        ),
        (good.replace("name: small", "name: prefiller1"), "two instances have this name"),
        (good.replace("sesame", "'open sesame'"), "admin_token: (not shown)"),
        (good.replace("requests: 100", "requests: 0"), "limits.requests: 0"),
        (good.replace("gpu3", "gpu 3"), "decoder1.host: gpu 3"),
        ("- a list".to_owned(), "invalid type"),
    ] {
        let problem = load(&Flags::default(), &bad).expect_err(says);
        assert!(problem.contains(says), "{problem} should say {says}");
    }
    let missing = Config::load(&Flags { config: Some("/nowhere/x.yaml".into()), ..Flags::default() });
    assert!(missing.expect_err("missing").to_string().contains("--config: /nowhere/x.yaml"));
    // MP mode needs no ports.
    let mp =
        good.replace("init_ports: [8300, 8301]", "").replace("alloc_ports: [8400, 8401]", "") + "kv: mp\n";
    load(&Flags::default(), &mp).expect("valid");
}
