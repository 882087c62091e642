//! The guides' files as written, contradictions, misspellings and texts that are no configuration.

use kvxfer_lmcache::config::{FileError, MAX_FILE, Translation, translate};

fn good(yaml: &str) -> Translation {
    let t = translate(yaml).expect("a file");
    assert!(t.problems.is_empty(), "{:?}", t.problems);
    t
}

fn value(t: &Translation, key: &str) -> String {
    t.config.get(key).map_or("-".into(), |v| serde_json::to_string(v).expect("JSON"))
}

#[test]
fn the_xpyd_guides_prefiller() {
    let t = good(include_str!("guides/xpyd-prefiller.yaml"));
    assert!(t.changed);
    for (key, wanted) in [
        ("enable_pd", "true"),
        ("pd_role", "\"sender\""),
        ("pd_peer_host", "\"localhost\""),
        ("pd_peer_init_port", "[55555]"),
        ("pd_buffer_size", "1073741824"),
        ("pd_buffer_device", "\"cuda\""),
        ("transfer_channel", "\"kvxfer\""),
        ("pd_proxy_host", "\"localhost\""),
        ("pd_proxy_port", "7500"),
        ("remote_serde", "null"),
        ("max_local_cpu_size", "0"),
    ] {
        assert_eq!(value(&t, key), wanted, "{key}");
    }
    assert!(t.config.keys().all(|k| !k.as_str().expect("text").contains("nixl")));
    // One sentence for each of the seven older keys and the three that were added.
    let older = t.notices.iter().filter(|n| n.key.contains("nixl")).count();
    assert_eq!((older, t.notices.len()), (7, 10), "{:?}", t.notices);
    assert!(t.notices.iter().any(|n| n.key == "nixl_enable_gc" && n.today.is_empty()));
}

#[test]
fn the_xpyd_guides_decoder() {
    let t = good(include_str!("guides/xpyd-decoder.yaml"));
    assert_eq!(value(&t, "pd_role"), "\"receiver\"");
    assert_eq!(
        (value(&t, "pd_peer_init_port"), value(&t, "pd_peer_alloc_port")),
        ("[55555]".into(), "[55556]".into())
    );
    assert_eq!(value(&t, "pd_proxy_port"), "-", "a decoder tells nobody");
}

#[test]
fn the_1p1d_guide() {
    let t = good(include_str!("guides/1p1d-prefiller.yaml"));
    assert_eq!(value(&t, "pd_buffer_device"), "\"cuda\"");
    assert_eq!(value(&t, "transfer_channel"), "\"nixl\"", "what is stated stays");
    assert!(t.notices.iter().any(|n| n.key == "transfer_channel" && n.text.contains("kvxfer")));
    let t = good(include_str!("guides/1p1d-decoder.yaml"));
    assert!(!t.changed);
    assert_eq!(value(&t, "pd_peer_init_port"), "7300");
}

#[test]
fn what_is_migrated_needs_no_translation() {
    for yaml in [include_str!("guides/xpyd-prefiller.yaml"), include_str!("guides/xpyd-decoder.yaml")] {
        let t = good(yaml);
        let again = good(&t.to_yaml());
        assert!(!again.changed, "{}", t.to_yaml());
        assert_eq!(again.config, t.config);
    }
}

#[test]
fn contradictions_name_both_keys_and_both_values() {
    let cases = [
        (
            "enable_pd: True\nnixl_role: sender\npd_role: receiver\n",
            ["nixl_role", "pd_role", "sender", "receiver"],
        ),
        ("pd_buffer_size: 1\nnixl_buffer_size: 2\n", ["pd_buffer_size", "nixl_buffer_size", "1", "2"]),
        ("nixl_peer_port: 5\npd_peer_init_port: [6]\n", ["nixl_peer_port", "pd_peer_init_port", "5", "6"]),
        ("enable_nixl: True\nenable_pd: False\n", ["enable_nixl", "enable_pd", "true", "false"]),
    ];
    for (yaml, words) in cases {
        let t = translate(yaml).expect("a file");
        let problem = t.contradiction().unwrap_or_else(|| panic!("{yaml}"));
        assert!(words.iter().all(|w| problem.text.contains(w)), "{}", problem.text);
        assert!(words[..2].iter().all(|w| problem.keys.iter().any(|k| k == w)), "{:?}", problem.keys);
    }
    // The same twice is no contradiction.
    assert!(
        translate("nixl_peer_port: 5\npd_peer_init_port: [5]\nnixl_role: \"Sender\"\npd_role: sender\n")
            .expect("a file")
            .contradiction()
            .is_none()
    );
}

#[test]
fn lmcaches_nixl_storage_keeps_its_keys() {
    let t = translate(
        "extra_config: {enable_nixl_storage: true}\nnixl_buffer_size: 5\nnixl_buffer_device: cpu\n",
    )
    .expect("a file");
    assert!(!t.changed && t.notices.is_empty(), "{:?}", t.notices);
    assert_eq!(value(&t, "nixl_buffer_size"), "5");
}

#[test]
fn what_would_be_refused_is_said_before() {
    let base = "enable_pd: True\ntransfer_channel: kvxfer\npd_buffer_device: cpu\n";
    let cases = [
        ("pd_role: boss\npd_buffer_size: 1\n", "pd_role"),
        ("pd_role: receiver\npd_buffer_size: 1\npd_peer_init_port: 7300\n", "pd_peer_host"),
        (
            "pd_role: receiver\npd_buffer_size: 1\npd_peer_host: h\npd_peer_init_port: 70000\n",
            "pd_peer_init_port",
        ),
        ("pd_role: sender\npd_buffer_size: 1\n", "pd_proxy_port"),
        ("pd_role: sender\npd_proxy_port: 7500\n", "pd_buffer_size"),
        ("pd_role: sender\npd_proxy_port: 7500\npd_buffer_size: 0\n", "pd_buffer_size"),
        (
            "pd_role: sender\npd_proxy_port: 7500\npd_buffer_size: 1\npd_backend_mode: fast\n",
            "pd_backend_mode",
        ),
    ];
    for (yaml, key) in cases {
        let t = translate(&format!("{base}{yaml}")).expect("a file");
        assert!(t.problems.iter().any(|p| p.keys == [key]), "{yaml}: {:?}", t.problems);
    }
    let t = translate(
        "enable_pd: True\npd_role: sender\npd_buffer_size: 1\npd_proxy_port: 1\ntransfer_channel: pigeon\n",
    )
    .expect("a file");
    let keys: Vec<_> = t.problems.iter().flat_map(|p| p.keys.clone()).collect();
    assert_eq!(keys, ["pd_buffer_device", "transfer_channel"]);
}

#[test]
fn a_misspelt_key_is_noticed_and_kept() {
    let t = translate("pd_bufer_size: 5\nmy_own_thing: 1\n").expect("a file");
    assert_eq!(t.notices.len(), 1);
    assert!(t.notices[0].text.contains("pd_buffer_size"));
    assert_eq!(value(&t, "pd_bufer_size"), "5");
}

#[test]
fn texts_that_are_no_configuration() {
    assert!(matches!(translate("- a\n- b\n"), Err(FileError::NotAMapping { found: "a list" })));
    assert!(matches!(translate("hello"), Err(FileError::NotAMapping { .. })));
    assert!(matches!(translate("a: [1, 2"), Err(FileError::Yaml { .. })));
    assert!(matches!(translate("a: 1\na: 2\n"), Err(FileError::Yaml { .. })), "the same key twice");
    assert!(matches!(translate("1: 2\n"), Err(FileError::Key { .. })));
    assert!(matches!(translate(&"#".repeat(MAX_FILE + 1)), Err(FileError::TooLarge { .. })));
    assert_eq!(translate("").expect("empty is fine").config.len(), 0);
    // An alias bomb and a deep nest end quickly, one way or the other.
    let mut bomb = String::from("b0: &b0 [x,x,x,x,x,x,x,x,x]\n");
    for i in 1..9 {
        let inside = format!("*b{},", i - 1).repeat(9);
        bomb += &["b", &i.to_string(), ": &b", &i.to_string(), " [", &inside, "]\n"].concat();
    }
    let _ = translate(&bomb);
    let _ = translate(&format!("a: {}", "[".repeat(10_000)));
}
