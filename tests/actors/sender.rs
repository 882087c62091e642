//! The prefiller as an actor.

use super::{agent, geometry, millis, pattern, text};
use kvxfer::channel::{ChunkSource, Delivery, DeliveryReport, Found, Reservation};
use kvxfer::proto::wire::ChunkSpec;
use kvxfer::{Agent, ChunkKey, Error, ErrorCode, Region, RequestId, Sender, SenderConfig};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::time::Duration;

pub(super) struct SenderRole {
    agent: Agent,
    sender: Option<Sender>,
    config: Value,
    source: Region,
    page: u64,
    slots: u64,
    next_slot: u64,
    reservations: HashMap<String, (Reservation, Vec<ChunkSpec>)>,
    deliveries: HashMap<String, Delivery>,
    found: Option<Found>,
}

impl SenderRole {
    /// `page_bytes`, `slots` (pages of source memory), and what every agent takes; `connect` names the receiver.
    pub(super) fn start(config: &Value) -> Result<Self, Error> {
        let agent = agent(config)?;
        let page = geometry(config).page_bytes;
        let slots = config["slots"].as_u64().unwrap_or(64);
        let source = agent.register(super::memory("sender", (page * slots) as usize)?)?;
        let mut role = Self {
            agent,
            sender: None,
            config: config.clone(),
            source,
            page,
            slots,
            next_slot: 0,
            reservations: HashMap::new(),
            deliveries: HashMap::new(),
            found: None,
        };
        if let Some(address) = config["connect"].as_str() {
            role.connect(address)?;
        }
        Ok(role)
    }

    fn connect(&mut self, address: &str) -> Result<(), Error> {
        let settings = SenderConfig {
            geometry: geometry(&self.config),
            request_timeout: millis(&self.config, "request_ms", 20_000),
            ..SenderConfig::default()
        };
        self.sender = Some(Sender::connect(&self.agent, address, settings, Duration::from_secs(10))?);
        Ok(())
    }

    fn sender(&self) -> &Sender {
        self.sender.as_ref().expect("connected")
    }

    /// Puts the pattern of `seed` into the next slot of source memory.
    fn fill(&mut self, seed: u64, len: u64) -> Result<ChunkSource, Error> {
        let offset = (self.next_slot % self.slots) * self.page;
        self.next_slot += 1;
        self.source.memory().write_at(offset, &pattern(seed, len as usize))?;
        Ok(ChunkSource::new(self.source.clone(), vec![(offset, len)]))
    }

    fn read(&mut self, seed: u64, timeout: Duration) -> Result<Value, Error> {
        let found = self.found.take().expect("queried");
        let chunks: Vec<_> = found.chunks().iter().map(|c| (c.index, c.len)).collect();
        let mut targets = Vec::new();
        for &(index, len) in &chunks {
            targets.push((index, self.fill(u64::MAX, len)?));
        }
        let report = found.read(&targets, timeout)?;
        let mut equal = true;
        for (index, target) in &targets {
            let (offset, len) = target.runs[0];
            let mut bytes = vec![0; len as usize];
            self.source.memory().read_at(offset, &mut bytes)?;
            equal &= bytes == pattern(seed + u64::from(*index), bytes.len());
        }
        Ok(json!({"equal": equal, "bytes": report.bytes, "transport": report.transport.as_str()}))
    }

    pub(super) fn command(&mut self, command: &Value) -> Result<Value, Error> {
        match text(command, "do") {
            "hello" => Ok(json!({"pid": std::process::id()})),
            "connect" => self.connect(text(command, "address")).map(|()| Value::Null),
            // All of a request at once: chunk i has seed `seed + i`.
            "send" => {
                let seed = command["seed"].as_u64().unwrap_or(1);
                let mut chunks = Vec::new();
                for (i, spec) in specs(command)?.into_iter().enumerate() {
                    let source = self.fill(seed + i as u64, spec.len)?;
                    chunks.push((spec, source));
                }
                let request = text(command, "request");
                let delivery = self.sender().send(RequestId::new(request)?, chunks, timeout(command))?;
                self.deliveries.insert(request.into(), delivery);
                Ok(Value::Null)
            }
            "reserve" => {
                let request = text(command, "request");
                let specs = specs(command)?;
                let (id, limit) = (RequestId::new(request)?, timeout(command));
                let reservation = if command["at_once"] == true {
                    self.sender().reserve_at_once(id, specs.clone(), 0, limit)?
                } else {
                    self.sender().reserve(id, specs.clone(), limit)?
                };
                self.reservations.insert(request.into(), (reservation, specs));
                Ok(Value::Null)
            }
            "admitted" => {
                let (reservation, _) = &self.reservations[text(command, "request")];
                reservation.wait_admitted(millis(command, "ms", 20_000)).map(|()| Value::Null)
            }
            "write" => {
                let i = command["chunk"].as_u64().expect("chunk") as usize;
                let len = self.reservations[text(command, "request")].1[i].len;
                let source = self.fill(command["seed"].as_u64().unwrap_or(1) + i as u64, len)?;
                self.reservations[text(command, "request")].0.write(i, source).map(|()| Value::Null)
            }
            "finish" => {
                let request = text(command, "request");
                let (reservation, _) = self.reservations.remove(request).expect("reserved");
                self.deliveries.insert(request.into(), reservation.finish());
                Ok(Value::Null)
            }
            "abort" => {
                let (reservation, _) = self.reservations.remove(text(command, "request")).expect("reserved");
                reservation.abort(ErrorCode::Cancelled);
                Ok(Value::Null)
            }
            "wait" => {
                let report = self.deliveries[text(command, "request")].wait(millis(command, "ms", 20_000))?;
                Ok(describe(&report))
            }
            // Asks for `keys` and holds what is found.
            "query" => {
                let keys = command["keys"].as_array().expect("keys");
                let keys = keys.iter().map(|k| Ok(ChunkKey::new(k.as_str().expect("key"))?));
                let (keys, lease) =
                    (keys.collect::<Result<_, Error>>()?, millis(command, "lease_ms", 20_000));
                let found = self.sender().query(keys, lease, millis(command, "ms", 20_000))?;
                let indexes: Vec<u32> = found.chunks().iter().map(|c| c.index).collect();
                self.found = Some(found);
                Ok(json!(indexes))
            }
            // Reads all that was found; chunk i of the query has seed `seed + i`.
            "read" => self.read(command["seed"].as_u64().unwrap_or(1), millis(command, "ms", 20_000)),
            "forget" => Ok(json!(self.deliveries.remove(text(command, "request")).is_some())),
            "paths" => Ok(self.sender().peer().paths().iter().map(|(k, d)| json!([k.as_str(), d])).collect()),
            "peer_state" => Ok(json!(format!("{:?}", self.sender().peer().state()))),
            "metrics" => Ok(json!(self.agent.metrics())),
            "resources" => Ok(super::receiver::resources()),
            other => panic!("a sender does not know {other:?}"),
        }
    }
}

/// `chunks`: `[[key, len], …]`.
fn specs(command: &Value) -> Result<Vec<ChunkSpec>, Error> {
    let chunks = command["chunks"].as_array().expect("chunks");
    chunks
        .iter()
        .map(|c| {
            let key = ChunkKey::new(c[0].as_str().expect("key"))?;
            Ok(ChunkSpec { key, len: c[1].as_u64().expect("len") })
        })
        .collect()
}

fn timeout(command: &Value) -> Option<Duration> {
    command["timeout_ms"].as_u64().map(Duration::from_millis)
}

fn describe(report: &DeliveryReport) -> Value {
    json!({
        "bytes": report.bytes, "written": report.written, "present": report.present,
        "transport": report.transport.as_str(),
    })
}
