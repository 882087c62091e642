//! One task per instance asks it now and then whether it is well, and at once when somebody had trouble with it.

use crate::router::InstanceId;
use crate::server::App;
use crate::upstream::Upstream;
use bytes::Bytes;
use hyper::{Method, StatusCode};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

/// The probers, by instance.
#[derive(Debug, Default)]
pub(crate) struct Probes {
    running: Mutex<HashMap<InstanceId, Arc<Notify>>>,
}

impl Probes {
    /// Somebody had trouble with it: look now.
    pub(crate) fn look_now(&self, id: InstanceId) {
        if let Some(notify) = self.running.lock().get(&id) {
            notify.notify_one();
        }
    }

    /// A prober for every instance that has none yet.
    pub(crate) fn cover(&self, app: &Arc<App>) {
        let instances = app.with(|router, _| router.instances());
        let mut running = self.running.lock();
        for (id, _) in instances {
            running.entry(id).or_insert_with(|| {
                let notify = Arc::new(Notify::new());
                tokio::spawn(probe(Arc::clone(app), id, Arc::clone(&notify)));
                notify
            });
        }
    }
}

async fn probe(app: Arc<App>, id: InstanceId, now: Arc<Notify>) {
    let mut looked = Instant::now();
    while let Some(instance) = app.with(|router, _| router.instance(id)) {
        let settings = app.settings();
        let headers = app.own_headers();
        let by = Instant::now() + settings.health.timeout;
        let answer = app
            .upstream
            .send(&instance, Method::GET, &settings.health.path, &headers, Bytes::new(), by)
            .await;
        let outcome = match answer {
            Ok(response) => {
                let status = response.status();
                // Read, so that the connection can be used again.
                let rest = Upstream::whole(&instance, response.into_body(), 64 << 10, by).await;
                match rest {
                    Ok(_) if status == StatusCode::OK => Ok(()),
                    Ok(_) => Err((false, format!("{} answered {}", settings.health.path, status.as_u16()))),
                    Err(trouble) => Err((false, trouble.text)),
                }
            }
            Err(trouble) => Err((trouble.failure == crate::router::Failure::Unreachable, trouble.text)),
        };
        let down = match outcome {
            Ok(()) => {
                if app.with(|router, now| router.probe_ok(now, id)) {
                    tracing::info!(instance = instance.name, "is back");
                }
                false
            }
            Err((refused, why)) => {
                if app.with(|router, now| router.probe_failed(now, id, refused, &why)) {
                    tracing::warn!(instance = instance.name, why, "is down");
                }
                app.with(|router, _| router.is_down(id))
            }
        };
        let pause = if down { settings.health.interval_down } else { settings.health.interval };
        if timeout(pause, now.notified()).await.is_ok() {
            // Many may complain at once about the same trouble.
            tokio::time::sleep_until(looked + Duration::from_millis(50)).await;
        }
        looked = Instant::now();
    }
    app.probes.running.lock().remove(&id);
}
