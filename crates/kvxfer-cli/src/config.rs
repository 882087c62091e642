//! `kvxfer config`: checks a file of agent settings, prints the default ones.

use crate::args::ConfigCommand;
use crate::{Failure, Verdict};
use kvxfer_core::AgentConfig;

pub(crate) fn run(command: &ConfigCommand) -> Result<Verdict, Failure> {
    match command {
        ConfigCommand::Check { file } => {
            let name = file.display();
            let text = std::fs::read_to_string(file).map_err(|e| Failure::usage(format!("{name}: {e}")))?;
            let json = file.extension().is_some_and(|e| e.eq_ignore_ascii_case("json"));
            let parsed: Result<AgentConfig, String> = if json {
                serde_json::from_str(&text).map_err(|e| e.to_string())
            } else {
                serde_yaml_ng::from_str(&text).map_err(|e| e.to_string())
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
        ConfigCommand::Default => {
            print!("{}", yaml(&AgentConfig::default())?);
            Ok(Verdict::Held)
        }
    }
}

fn yaml(config: &AgentConfig) -> Result<String, Failure> {
    serde_yaml_ng::to_string(config).map_err(|e| Failure::new(e.to_string()))
}

fn indent(text: &str) -> String {
    text.lines().flat_map(|l| ["  ", l, "\n"]).collect()
}
