//! `kvxfer config`: says what a file of `LMCache`'s, or of agent settings, comes to; prints the agent's defaults.

use crate::args::ConfigCommand;
use crate::table::{Paint, Table, Tone, text as cell};
use crate::{Failure, Verdict};
use kvxfer_core::AgentConfig;
use kvxfer_lmcache::config::{MAX_FILE, Translation, translate};
use std::io::{Read, Write};
use std::path::Path;

pub(crate) fn run(command: &ConfigCommand) -> Result<Verdict, Failure> {
    match command {
        ConfigCommand::Check { file, migrate, output, json } => {
            let (name, text) = read(file)?;
            if *migrate || is_lmcache(&text) {
                let translation = translate(&text).map_err(|e| Failure::new(format!("{name}: {e}")))?;
                if *migrate {
                    migrated(&name, &translation, output.as_deref())
                } else if *json {
                    println!(
                        "{}",
                        serde_json::to_string(&translation).map_err(|e| Failure::new(e.to_string()))?
                    );
                    Ok(verdict(&translation))
                } else {
                    Ok(explain(&name, &translation))
                }
            } else {
                agent(&name, file, &text)
            }
        }
        ConfigCommand::Default => {
            print!("{}", yaml(&AgentConfig::default())?);
            Ok(Verdict::Held)
        }
    }
}

fn read(file: &Path) -> Result<(String, String), Failure> {
    let mut text = String::new();
    if file == Path::new("-") {
        let name = "standard input".to_owned();
        std::io::stdin()
            .take(MAX_FILE as u64 + 1)
            .read_to_string(&mut text)
            .map_err(|e| Failure::usage(format!("{name}: {e}")))?;
        return Ok((name, text));
    }
    let name = file.display().to_string();
    let open = std::fs::File::open(file).map_err(|e| Failure::usage(format!("{name}: {e}")))?;
    open.take(MAX_FILE as u64 + 1)
        .read_to_string(&mut text)
        .map_err(|e| Failure::usage(format!("{name}: {e}")))?;
    Ok((name, text))
}

/// `LMCache`'s files have keys that no agent has.
fn is_lmcache(text: &str) -> bool {
    const ITS: [&str; 6] = ["pd_", "nixl_", "enable_", "local_", "max_local_", "chunk_size"];
    serde_yaml_ng::from_str::<serde_yaml_ng::Mapping>(text).is_ok_and(|m| {
        m.keys()
            .filter_map(|k| k.as_str())
            .any(|k| ITS.iter().any(|i| k.starts_with(i)) || k == "transfer_channel")
    })
}

fn explain(name: &str, t: &Translation) -> Verdict {
    let mut table = Table::new(["key", "today", "what becomes of it"]);
    for (key, value) in &t.config {
        let key = key.as_str().unwrap_or_default();
        let notices: Vec<_> = t.notices.iter().filter(|n| n.today == key).collect();
        let value = serde_json::to_string(value).unwrap_or_default();
        if notices.is_empty() {
            table.row([cell(key), cell(key), cell(format!("stays {value}")).tone(Tone::Dim)]);
        }
        for notice in notices {
            let text = format!("{} ({value})", notice.text);
            table.row([cell(&notice.key), cell(key), cell(text).tone(Tone::Warn)]);
        }
    }
    for notice in t.notices.iter().filter(|n| n.today.is_empty()) {
        table.row([cell(&notice.key), cell("-"), cell(&notice.text).tone(Tone::Warn)]);
    }
    print!("{}", table.render(Paint::stdout()));
    for problem in &t.problems {
        eprintln!("{name}: {}", problem.text);
    }
    if t.problems.is_empty() {
        let how = if t.changed {
            "works as written with kvxfer installed; --migrate prints it in today's words"
        } else {
            "ok"
        };
        println!("{name}: {how}");
    }
    verdict(t)
}

fn verdict(t: &Translation) -> Verdict {
    if t.problems.is_empty() { Verdict::Held } else { Verdict::Broken }
}

fn migrated(name: &str, t: &Translation, output: Option<&Path>) -> Result<Verdict, Failure> {
    if let Some(problem) = t.contradiction() {
        eprintln!("{name}: {}", problem.text);
        return Ok(Verdict::Broken);
    }
    match output {
        None => print!("{}", t.to_yaml()),
        Some(path) => {
            let shown = path.display();
            let mut file =
                std::fs::File::create_new(path).map_err(|e| Failure::usage(format!("{shown}: {e}")))?;
            file.write_all(t.to_yaml().as_bytes()).map_err(|e| Failure::new(format!("{shown}: {e}")))?;
            eprintln!("{shown}: written");
        }
    }
    for problem in &t.problems {
        eprintln!("{name}: {}", problem.text);
    }
    Ok(verdict(t))
}

fn agent(name: &str, file: &Path, text: &str) -> Result<Verdict, Failure> {
    let json = file.extension().is_some_and(|e| e.eq_ignore_ascii_case("json"));
    let parsed: Result<AgentConfig, String> = if json {
        serde_json::from_str(text).map_err(|e| e.to_string())
    } else {
        serde_yaml_ng::from_str(text).map_err(|e| e.to_string())
    };
    match parsed {
        Ok(config) => {
            println!("{name}: ok");
            print!("{}", indent(&yaml(&config)?));
            Ok(Verdict::Held)
        }
        Err(problem) => {
            eprintln!("{name}: {problem}");
            Ok(Verdict::Broken)
        }
    }
}

fn yaml(config: &AgentConfig) -> Result<String, Failure> {
    serde_yaml_ng::to_string(config).map_err(|e| Failure::new(e.to_string()))
}

fn indent(text: &str) -> String {
    text.lines().flat_map(|l| ["  ", l, "\n"]).collect()
}
