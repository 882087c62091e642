//! `bench --gpu` and the doctor's GPU lines, under the stand-in CUDA driver.

use serde_json::Value;
use std::process::{Command, Output};

fn kvxfer(arguments: &[&str], variables: &[(&str, &str)]) -> Option<Output> {
    if !kvxfer_cuda_standin::available() {
        println!("SKIPPED: no C++ compiler, so no stand-in CUDA driver (Debian: g++)");
        return None;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_kvxfer"))
        .args(arguments)
        .env("LD_LIBRARY_PATH", kvxfer_cuda_standin::folder())
        .envs(variables.iter().copied())
        .output()
        .expect("start");
    Some(output)
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text)
        .unwrap_or_else(|e| panic!("{e}: {text}{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn the_benchmark_moves_and_compares_every_row() {
    let arguments = ["bench", "--gpu", "--quick", "--no-progress", "--reps", "2", "--json", "-"];
    let Some(output) = kvxfer(&arguments, &[]) else { return };
    let run = json(&output);
    assert_eq!(run["header"]["standin"], true, "{run:#}");
    nixl_is_not_there(&run);
    let rows: Vec<_> =
        run["rows"].as_array().expect("rows").iter().map(|r| r["what"].as_str().expect("what")).collect();
    for part in [
        "bulk Write",
        "bulk Read",
        "scattered",
        "store of",
        "burst of 1 ",
        "burst of 16",
        "host pool",
        "host to",
        "tcp",
        "4096 bytes",
    ] {
        assert!(rows.iter().any(|r| r.contains(part)), "{part} is not among {rows:?}");
    }
    let bars: Vec<_> = run["rows"]
        .as_array()
        .expect("rows")
        .iter()
        .flat_map(|r| r["bars"].as_array().expect("bars"))
        .collect();
    assert_eq!(bars.len(), 11, "{bars:#?}");
    assert!(bars.iter().filter(|b| b["found"].is_number()).count() >= 10, "{bars:#?}");
    // A table for people, which does not judge what is no measurement.
    let Some(output) = kvxfer(&["bench", "--gpu", "--quick", "--no-progress", "--reps", "1"], &[]) else {
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("stand-in driver") && text.contains("not judged") && !text.contains("MISSED"),
        "{text}"
    );
}

#[test]
fn two_devices_that_do_not_reach_each_other_are_measured_too() {
    let arguments =
        ["bench", "--gpu", "--quick", "--no-progress", "--reps", "1", "--gpu-devices", "1,0", "--json", "-"];
    let Some(output) = kvxfer(&arguments, &[("KVXSTANDIN_DEVICES", "2")]) else { return };
    let run = json(&output);
    assert_eq!(run["header"]["one_device"], false);
    nixl_is_not_there(&run);
}

/// NIXL, installed or not, knows nothing of the stand-in's memory: the reason is said, and no figure is made up.
fn nixl_is_not_there(run: &Value) {
    let notes = run["notes"].as_array().expect("notes");
    let said = notes
        .iter()
        .filter_map(Value::as_str)
        .find_map(|n| n.split_once("NIXL is not among the baselines: "));
    let (_, reason) = said.unwrap_or_else(|| panic!("nothing of NIXL in {notes:?}"));
    assert!(reason.contains("NIXL not available") || reason.contains("could not register"), "{reason}");
    for row in run["rows"].as_array().expect("rows") {
        for baseline in row["against"].as_array().expect("against") {
            assert_ne!(baseline["name"], "NIXL", "{row:#}");
        }
        for bar in row["bars"].as_array().expect("bars") {
            let of_nixl = bar["what"].as_str().is_some_and(|w| w.contains("NIXL"));
            assert!(!of_nixl || (bar["found"].is_null() && bar["met"].is_null()), "{bar:#}");
        }
    }
}

#[test]
fn what_is_missing_is_said() {
    let none = Command::new(env!("CARGO_BIN_EXE_kvxfer"))
        .args(["bench", "--gpu"])
        .env("CUDA_VISIBLE_DEVICES", "")
        .output();
    let none = none.expect("start");
    assert_eq!(none.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&none.stderr).contains("CUDA not available"));
    let Some(output) = kvxfer(&["bench", "--gpu", "--gpu-devices", "0,5"], &[]) else { return };
    assert!(String::from_utf8_lossy(&output.stderr).contains("CUDA device 5 is not visible"));
    let Some(output) = kvxfer(&["bench", "--gpu", "--gpu-devices", "0"], &[]) else { return };
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_doctor_tries_two_processes() {
    let line = |output: &Output, id: &str| -> Value {
        let report = json(output);
        let checks = report["checks"].as_array().expect("checks").clone();
        checks.into_iter().find(|c| c["id"] == id).unwrap_or_else(|| panic!("no {id} in {report:#}"))
    };
    let arguments = ["doctor", "--secs", "0", "--json"];
    let Some(output) = kvxfer(&arguments, &[("KVXSTANDIN_DEVICES", "2")]) else { return };
    for id in ["cuda", "cuda-batch", "cuda-device-0", "cuda-device-1", "cuda-ipc-0-0", "cuda-ipc-0-1"] {
        assert_eq!(line(&output, id)["verdict"], "ok", "{id}");
    }
    let Some(output) = kvxfer(&arguments, &[("KVXSTANDIN_NO_IPC", "1")]) else { return };
    let refused = line(&output, "cuda-ipc-0-0");
    assert_eq!(refused["verdict"], "missing");
    assert!(refused["fix"].as_str().expect("fix").contains("--ipc=host"), "{refused}");
    let refused = [("KVXSTANDIN_FAIL", "cuModuleLoadDataEx:1:218"), ("KVXFER_NVRTC", "0")];
    let Some(output) = kvxfer(&arguments, &refused) else { return };
    let device = line(&output, "cuda-device-0");
    assert_eq!(device["verdict"], "degraded");
    assert!(device["found"].as_str().expect("found").contains("CUDA_ERROR_INVALID_PTX"), "{device}");
}
