//! The decoder as an actor.

use super::{agent, geometry, millis, pattern, text};
use kvxfer::channel::{Chunk, Lookup, ReceiverEvent};
use kvxfer::{Agent, ChunkKey, Error, Receiver, ReceiverConfig, RequestId};
use serde_json::{Value, json};
use std::collections::HashMap;

pub(super) struct ReceiverRole {
    agent: Agent,
    receiver: Receiver,
    held: HashMap<String, Chunk>,
}

impl ReceiverRole {
    /// `pages`, `page_bytes`, `lease_ms`, `admission_ms`, `retention_ms`, `max_queue`, and what every agent takes.
    pub(super) fn start(config: &Value) -> Result<Self, Error> {
        let mut config = config.clone();
        if config["listen"].is_null() {
            config["listen"] = json!("tcp://127.0.0.1:0");
        }
        let agent = agent(&config)?;
        let (pages, geometry) = (config["pages"].as_u64().unwrap_or(8) as u32, geometry(&config));
        let memory = super::memory("receiver", pages as usize * geometry.page_bytes as usize)?;
        let receiver = Receiver::with_memory(
            &agent,
            ReceiverConfig {
                pages,
                geometry,
                lease: millis(&config, "lease_ms", 30_000),
                admission_timeout: millis(&config, "admission_ms", 30_000),
                retention: millis(&config, "retention_ms", 120_000),
                max_queue: config["max_queue"].as_u64().unwrap_or(1024) as usize,
                ..ReceiverConfig::default()
            },
            memory,
        )?;
        Ok(Self { agent, receiver, held: HashMap::new() })
    }

    pub(super) fn command(&mut self, command: &Value) -> Result<Value, Error> {
        match text(command, "do") {
            "hello" => Ok(json!({"address": self.agent.addresses()[0], "pid": std::process::id()})),
            "lookup" => Ok(match self.receiver.lookup(&ChunkKey::new(text(command, "key"))?) {
                Lookup::Present(len) => json!({"state": "present", "len": len}),
                Lookup::Pending => json!({"state": "pending"}),
                Lookup::Absent => json!({"state": "absent"}),
            }),
            // Reads a published chunk and compares every byte with the pattern of `seed`.
            "check" => {
                let chunk = self.receiver.acquire(&ChunkKey::new(text(command, "key"))?)?;
                let mut bytes = vec![0; chunk.len() as usize];
                chunk.read_at(0, &mut bytes)?;
                let expected = pattern(command["seed"].as_u64().expect("seed"), bytes.len());
                Ok(json!({"equal": bytes == expected, "len": bytes.len()}))
            }
            "hold" => {
                let key = text(command, "key");
                self.held.insert(key.into(), self.receiver.acquire(&ChunkKey::new(key)?)?);
                Ok(Value::Null)
            }
            "release" => Ok(json!(self.held.remove(text(command, "key")).is_some())),
            "remove" => Ok(json!(self.receiver.remove(&ChunkKey::new(text(command, "key"))?))),
            "wait" => {
                let request = RequestId::new(text(command, "request"))?;
                self.receiver.wait_request(&request, millis(command, "ms", 20_000))?;
                Ok(Value::Null)
            }
            "event" => Ok(match self.receiver.next_event(millis(command, "ms", 20_000)) {
                None => Value::Null,
                Some(ReceiverEvent::Ready { request, .. }) => json!({"ready": request.as_str()}),
                Some(ReceiverEvent::Failed { request, code, text, .. }) => {
                    json!({"failed": request.as_str(), "code": code.as_str(), "text": text})
                }
            }),
            "stats" => {
                let s = self.receiver.stats();
                Ok(json!({
                    "pages": s.pages, "free": s.free, "writing": s.writing, "published": s.published,
                    "pinned": s.pinned, "quarantined": s.quarantined, "advanced": s.advanced, "queued": s.queued, "active": s.active,
                }))
            }
            // Every byte of the pool, as one number.
            "pool_digest" => {
                let memory = self.receiver.memory();
                let mut bytes = vec![0; memory.len()];
                memory.read_at(0, &mut bytes)?;
                Ok(json!(xxhash_rust::xxh3::xxh3_64(&bytes)))
            }
            "peers" => Ok(self.agent.peers().iter().map(|p| p.name().to_string()).collect()),
            "metrics" => Ok(json!(self.agent.metrics())),
            "resources" => Ok(resources()),
            other => panic!("a receiver does not know {other:?}"),
        }
    }
}

/// Open descriptors and threads of this process.
pub(super) fn resources() -> Value {
    let count = |path| std::fs::read_dir(path).map_or(0, Iterator::count);
    json!({"fds": count("/proc/self/fd"), "threads": count("/proc/self/task")})
}
