//! Connections of clients: accepted, encrypted if wished, served, and let go in order at the end.

use super::{App, routes};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

/// How long a client may take for the TLS handshake, and for the head of a request.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where clients come in.
pub(super) struct Door {
    app: Arc<App>,
    service: TowerToHyperService<axum::Router>,
    http: hyper::server::conn::http1::Builder,
    tls: Arc<RwLock<Option<TlsAcceptor>>>,
    graceful: Mutex<Option<GracefulShutdown>>,
    open: AtomicUsize,
}

impl Door {
    pub(super) fn new(app: &Arc<App>, tls: Arc<RwLock<Option<TlsAcceptor>>>) -> Arc<Self> {
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(PATIENCE)
            .max_buf_size(64 << 10)
            .pipeline_flush(true);
        Arc::new(Self {
            app: Arc::clone(app),
            service: TowerToHyperService::new(routes::router(app)),
            http,
            tls,
            graceful: Mutex::new(Some(GracefulShutdown::new())),
            open: AtomicUsize::new(0),
        })
    }

    /// Serves whoever connects.
    pub(super) async fn accept(self: Arc<Self>, listener: TcpListener) {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(e) => {
                    // Out of descriptors, or the client is gone already: others are waiting.
                    tracing::warn!(error = %e, "cannot accept a client's connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let most = self.app.settings().limits.connections;
            if self.open.fetch_add(1, Ordering::Relaxed) >= most {
                self.open.fetch_sub(1, Ordering::Relaxed);
                tracing::warn!("more than {most} clients are connected; this one is refused");
                continue;
            }
            let door = Arc::clone(&self);
            tokio::spawn(async move {
                door.greet(stream).await;
                door.open.fetch_sub(1, Ordering::Relaxed);
            });
        }
    }

    async fn greet(&self, stream: TcpStream) {
        if let Err(e) = stream.set_nodelay(true) {
            tracing::debug!(error = %e, "a client's connection");
        }
        let tls = self.tls.read().clone();
        match tls {
            None => self.serve(stream).await,
            Some(tls) => match timeout(PATIENCE, tls.accept(stream)).await {
                Ok(Ok(stream)) => self.serve(stream).await,
                Ok(Err(e)) => tracing::debug!(error = %e, "a TLS handshake failed"),
                Err(_) => tracing::debug!("a TLS handshake took too long"),
            },
        }
    }

    async fn serve(&self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let connection = self.http.serve_connection(TokioIo::new(stream), self.service.clone());
        let guard = self.graceful.lock().as_ref().map(GracefulShutdown::watcher);
        let served = match guard {
            Some(guard) => guard.watch(connection).await,
            None => connection.await,
        };
        if let Err(e) = served {
            tracing::debug!(error = %e, "a client's connection ended");
        }
    }

    /// Lets every connection finish what it is doing. False when that took longer than `patience`.
    pub(super) async fn drain(&self, patience: Duration) -> bool {
        let Some(graceful) = self.graceful.lock().take() else { return true };
        timeout(patience, graceful.shutdown()).await.is_ok()
    }
}
