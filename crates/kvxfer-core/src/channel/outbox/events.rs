//! What the outbox has to tell: events that wait to be taken, and who is woken for them.

use super::{RequestId, Result};
use crate::channel::sender::DeliveryReport;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Events that wait at most, releases not counted; the oldest are dropped.
const MAX_ENDS: usize = 16_384;

/// What happens; see [`super::Outbox::next_event`].
#[derive(Debug)]
pub enum OutboxEvent {
    /// Nothing reads the batch's bytes any more.
    Released {
        /// As [`super::Outbox::put`] numbered it.
        batch: u64,
    },
    /// A request has ended: every chunk is published at the receiver, or why not.
    Ended {
        /// The request.
        request: RequestId,
        /// How.
        result: Result<DeliveryReport>,
        /// From its first batch to its end.
        took: Duration,
        /// From its last batch, which may not have come when it failed, to its end.
        after_last: Duration,
    },
}

#[derive(Default)]
pub(super) struct Events {
    queue: Mutex<Queue>,
    released: Condvar,
}

#[derive(Default)]
struct Queue {
    events: VecDeque<OutboxEvent>,
    ends: usize,
    /// Batches not released.
    open: usize,
    closed: bool,
    /// Threads that wait for an event. The one that came last is woken first: it came for this, and the engine's own thread, which is
    /// always there, can sleep on.
    waiting: Vec<Arc<Condvar>>,
    /// Threads that look for events anyway.
    attended: usize,
}

/// Held by every source of a batch.
pub(super) struct Release {
    batch: u64,
    events: Arc<Events>,
}

impl Drop for Release {
    fn drop(&mut self) {
        self.events.push(OutboxEvent::Released { batch: self.batch });
    }
}

impl Events {
    /// A batch whose bytes are read until the last clone of this is gone.
    pub(super) fn open(self: &Arc<Self>, batch: u64) -> Arc<Release> {
        self.queue.lock().open += 1;
        Arc::new(Release { batch, events: self.clone() })
    }

    pub(super) fn push(&self, event: OutboxEvent) {
        let mut queue = self.queue.lock();
        if matches!(event, OutboxEvent::Released { .. }) {
            queue.open -= 1;
            self.released.notify_all();
        } else {
            queue.ends += 1;
            queue.drop_oldest_end();
        }
        queue.events.push_back(event);
        if queue.closed {
            // Perhaps the last one: whoever finds nothing more is done.
            queue.wake_all();
        } else if queue.attended == 0
            && let Some(last) = queue.waiting.pop()
        {
            last.notify_one();
        }
    }

    /// The next event; `None` when the time is over, or nothing will come any more.
    pub(super) fn next(&self, timeout: Duration) -> Option<OutboxEvent> {
        let mut queue = self.queue.lock();
        if let Some(event) = queue.pop() {
            return Some(event);
        }
        let deadline = Instant::now() + timeout;
        let me = Arc::new(Condvar::new());
        loop {
            if queue.closed && queue.open == 0 {
                return None;
            }
            queue.waiting.push(me.clone());
            let late = me.wait_until(&mut queue, deadline).timed_out();
            queue.waiting.retain(|w| !Arc::ptr_eq(w, &me));
            let event = queue.pop();
            if event.is_some() || late {
                return event;
            }
        }
    }

    /// Events that wait to be taken.
    pub(super) fn len(&self) -> usize {
        self.queue.lock().events.len()
    }

    /// Has nobody woken while `f` runs, after which its caller takes what there is.
    pub(super) fn attended<T>(&self, f: impl FnOnce() -> T) -> T {
        self.queue.lock().attended += 1;
        let result = f();
        self.queue.lock().attended -= 1;
        result
    }

    /// No batch will be opened any more.
    pub(super) fn close(&self) {
        let mut queue = self.queue.lock();
        queue.closed = true;
        queue.wake_all();
    }

    /// Waits until all batches are released; the number of those that are not is the error.
    pub(super) fn wait_released(&self, deadline: Instant) -> std::result::Result<(), usize> {
        let mut queue = self.queue.lock();
        while queue.open > 0 {
            if self.released.wait_until(&mut queue, deadline).timed_out() && queue.open > 0 {
                return Err(queue.open);
            }
        }
        Ok(())
    }
}

impl Queue {
    fn pop(&mut self) -> Option<OutboxEvent> {
        let event = self.events.pop_front()?;
        self.ends -= usize::from(matches!(event, OutboxEvent::Ended { .. }));
        Some(event)
    }

    fn drop_oldest_end(&mut self) {
        let ended = |e: &OutboxEvent| matches!(e, OutboxEvent::Ended { .. });
        if self.ends > MAX_ENDS
            && let Some(oldest) = self.events.iter().position(ended)
        {
            self.events.remove(oldest);
            self.ends -= 1;
        }
    }

    fn wake_all(&mut self) {
        self.waiting.drain(..).for_each(|w| {
            w.notify_one();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use kvxfer_proto::ErrorCode;

    const SOON: Duration = Duration::from_secs(20);

    fn end(name: &str) -> OutboxEvent {
        OutboxEvent::Ended {
            request: RequestId::new(name).expect("a name"),
            result: Err(Error::failed(ErrorCode::Cancelled, "a test")),
            took: Duration::ZERO,
            after_last: Duration::ZERO,
        }
    }

    fn name(event: Option<OutboxEvent>) -> Option<String> {
        match event? {
            OutboxEvent::Ended { request, .. } => Some(request.to_string()),
            OutboxEvent::Released { batch } => Some(batch.to_string()),
        }
    }

    /// A thread that waits for the next event, once it does.
    fn waiter(events: &Arc<Events>) -> std::thread::JoinHandle<Option<String>> {
        let before = events.queue.lock().waiting.len();
        let mine = events.clone();
        let thread = std::thread::spawn(move || name(mine.next(SOON)));
        while events.queue.lock().waiting.len() == before {
            std::thread::yield_now();
        }
        thread
    }

    #[test]
    fn the_thread_that_came_last_is_woken_and_the_first_sleeps_on() {
        let events = Arc::new(Events::default());
        let (first, last) = (waiter(&events), waiter(&events));
        events.push(end("a"));
        assert_eq!(last.join().expect("no panic").as_deref(), Some("a"));
        assert_eq!(events.queue.lock().waiting.len(), 1, "nobody else was woken");
        events.push(end("b"));
        assert_eq!(first.join().expect("no panic").as_deref(), Some("b"));
    }

    #[test]
    fn nobody_is_woken_for_a_thread_that_looks_anyway() {
        let events = Arc::new(Events::default());
        let sleeps = waiter(&events);
        events.attended(|| events.push(end("a")));
        assert_eq!(events.queue.lock().waiting.len(), 1, "nobody was woken");
        assert_eq!(name(events.next(Duration::ZERO)).as_deref(), Some("a"));
        events.push(end("b"));
        assert_eq!(sleeps.join().expect("no panic").as_deref(), Some("b"));
    }

    #[test]
    fn who_does_not_wait_any_more_is_not_woken() {
        let events = Arc::new(Events::default());
        let stays = waiter(&events);
        assert!(events.next(Duration::from_millis(5)).is_none(), "nothing came");
        events.push(end("a"));
        assert_eq!(stays.join().expect("no panic").as_deref(), Some("a"));
    }

    #[test]
    fn the_last_release_ends_every_wait_of_a_closed_outbox() {
        let events = Arc::new(Events::default());
        let release = events.open(7);
        events.close();
        assert_eq!(events.wait_released(Instant::now()), Err(1));
        let waiters = [waiter(&events), waiter(&events)];
        drop(release);
        let mut found = waiters.map(|w| w.join().expect("no panic"));
        found.sort();
        assert_eq!(found, [None, Some("7".into())]);
        assert_eq!(events.wait_released(Instant::now()), Ok(()));
    }
}
