//! Word to the proxy: one `ZeroMQ` PUSH message per request, when its cache has arrived or will not.

use kvxfer_proto::notify::{self, Notification};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use zeromq::{PushSocket, Socket, SocketSend};

/// How long a message may take, and the pause between two attempts.
const DEADLINE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

/// Sends notifications to the proxy's PULL socket; without an address it only logs them.
#[derive(Clone)]
pub(crate) struct Notifier {
    endpoint: Option<String>,
    /// Speak `LMCache`'s message only, which knows no failure.
    plain: bool,
    runtime: Handle,
}

impl Notifier {
    pub(crate) fn new(proxy: Option<(String, u16)>, plain: bool, runtime: Handle) -> Self {
        let endpoint = proxy.map(|(host, port)| format!("tcp://{host}:{port}"));
        Self { endpoint, plain, runtime }
    }

    /// Returns at once.
    pub(crate) fn send(&self, notification: Notification) {
        let notification = match notification {
            Notification::KvReady { req_id, .. } if self.plain => Notification::ProxyNotif { req_id },
            Notification::KvFailed { .. } if self.plain => return,
            other => other,
        };
        tracing::debug!(?notification, "to the proxy");
        let Some(endpoint) = self.endpoint.clone() else { return };
        let bytes = match notify::encode(&notification) {
            Ok(bytes) => bytes,
            Err(e) => {
                tracing::error!(error = %e, request = notification.req_id(), "cannot tell the proxy");
                return;
            }
        };
        self.runtime.spawn(async move {
            let deadline = Instant::now() + DEADLINE;
            while let Err(problem) = push(&endpoint, bytes.clone()).await {
                if Instant::now() + PAUSE > deadline {
                    tracing::error!(
                        endpoint,
                        problem,
                        request = notification.req_id(),
                        "cannot tell the proxy"
                    );
                    return;
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
    }
}

/// One connection per message: a proxy that was restarted in between is then simply the new one, while an old connection
/// would swallow the first message after the restart.
async fn push(endpoint: &str, bytes: Vec<u8>) -> Result<(), String> {
    let work = async {
        let mut socket = PushSocket::new();
        socket.connect(endpoint).await.map_err(|e| e.to_string())?;
        socket.send(bytes.into()).await.map_err(|e| e.to_string())
    };
    match tokio::time::timeout(Duration::from_secs(2), work).await {
        Ok(result) => result,
        Err(_) => Err("no answer within 2 s".into()),
    }
}
