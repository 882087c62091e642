//! A stream written as ordinary sequential code: a future that hands out pieces while it runs.
//!
//! No task is spawned and no channel is needed: whoever reads the stream drives the future, and dropping the stream
//! drops everything the future holds. That is how a client's disconnect cancels what was done for it.

use futures_util::Stream;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// Where the future puts its pieces.
#[derive(Debug)]
pub(crate) struct Emitter<T> {
    shared: Arc<Mutex<Shared<T>>>,
}

#[derive(Debug)]
struct Shared<T> {
    pieces: VecDeque<T>,
    /// Those who wait until their piece is taken.
    waiting: Vec<Waker>,
}

impl<T> Clone for Emitter<T> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<T> Emitter<T> {
    /// Hands out a piece and waits until it is taken, so that a slow reader slows the writer down.
    pub(crate) async fn emit(&self, piece: T) {
        self.shared.lock().pieces.push_back(piece);
        std::future::poll_fn(|cx| {
            let mut shared = self.shared.lock();
            if shared.pieces.is_empty() {
                return Poll::Ready(());
            }
            if !shared.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                shared.waiting.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}

/// The stream of what `run` emits; it ends when the future does.
pub(crate) fn stream<T, F, R>(run: R) -> Pieces<T>
where
    T: Send + 'static,
    R: FnOnce(Emitter<T>) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let shared = Arc::new(Mutex::new(Shared { pieces: VecDeque::new(), waiting: Vec::new() }));
    let future = run(Emitter { shared: Arc::clone(&shared) });
    Pieces { shared, future: Some(Box::pin(future)) }
}

/// See [`stream`].
pub(crate) struct Pieces<T> {
    shared: Arc<Mutex<Shared<T>>>,
    future: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl<T> Pieces<T> {
    fn take(&self) -> Option<T> {
        let (piece, waiting) = {
            let mut shared = self.shared.lock();
            let piece = shared.pieces.pop_front()?;
            let waiting =
                if shared.pieces.is_empty() { std::mem::take(&mut shared.waiting) } else { Vec::new() };
            (piece, waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
        Some(piece)
    }
}

impl<T> Stream for Pieces<T> {
    type Item = T;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        if let Some(piece) = self.take() {
            return Poll::Ready(Some(piece));
        }
        let Some(future) = &mut self.future else { return Poll::Ready(None) };
        let ended = future.as_mut().poll(cx).is_ready();
        if ended {
            // What it held is let go now, not when the reader gets around to dropping the stream.
            self.future = None;
        }
        match self.take() {
            Some(piece) => Poll::Ready(Some(piece)),
            None if ended => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{StreamExt as _, stream::FuturesUnordered};

    #[tokio::test]
    async fn pieces_come_in_order_and_the_end_after_them() {
        let pieces = stream(|out: Emitter<u32>| async move {
            for i in 0..100 {
                if i % 7 == 0 {
                    tokio::task::yield_now().await;
                }
                out.emit(i).await;
            }
        });
        assert_eq!(pieces.collect::<Vec<_>>().await, (0..100).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn several_writers_share_one_stream() {
        let mut seen: Vec<u32> = stream(|out: Emitter<u32>| async move {
            let writers: FuturesUnordered<_> = (0..10)
                .map(|w| {
                    let out = out.clone();
                    async move {
                        for i in 0..20 {
                            out.emit(w * 100 + i).await;
                            tokio::task::yield_now().await;
                        }
                    }
                })
                .collect();
            writers.collect::<Vec<()>>().await;
        })
        .collect()
        .await;
        for w in 0..10 {
            let mine: Vec<u32> = seen.iter().copied().filter(|x| x / 100 == w).collect();
            assert_eq!(mine, (w * 100..w * 100 + 20).collect::<Vec<_>>());
        }
        seen.sort_unstable();
        assert_eq!(seen.len(), 200);
    }

    #[tokio::test]
    async fn dropping_the_stream_drops_what_the_future_holds() {
        struct Held(Arc<Mutex<bool>>);
        impl Drop for Held {
            fn drop(&mut self) {
                *self.0.lock() = true;
            }
        }
        let dropped = Arc::new(Mutex::new(false));
        let held = Held(Arc::clone(&dropped));
        let mut pieces = stream(|out: Emitter<u32>| async move {
            let _held = held;
            out.emit(1).await;
            std::future::pending::<()>().await;
        });
        assert_eq!(pieces.next().await, Some(1));
        drop(pieces);
        assert!(*dropped.lock());
    }
}
