//! The order in which waiting requests are admitted.
//!
//! First come, first served, with a bounded exception: while a request does not fit, later ones that do may pass it, so that a
//! large request does not idle the pool. Each waiting request is passed at most [`MAX_PASSED`] times; from then on nobody
//! behind it is given a page until it has been admitted or its deadline has passed. A request that needs no page (all its
//! chunks are present) takes nothing from anybody and is never held up. So a small request of one sender does not wait for
//! a large one of another, and the large one does not starve.

use crate::Time;
use crate::pool::Owner;
use std::collections::VecDeque;

/// How often a waiting request lets others pass.
pub const MAX_PASSED: u32 = 16;
/// How far behind the head is looked for requests that fit.
const WINDOW: usize = 64;

/// The queue.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    owner: Owner,
    deadline: Time,
    passed: u32,
}

/// What came of an attempt to admit one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// It leaves the queue: admitted or refused.
    Left,
    /// It leaves the queue without having taken a page.
    LeftFree,
    /// It does not fit now.
    Waits,
}

impl Queue {
    /// Requests that wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }
    /// True when none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
    /// Adds a request at the end.
    pub fn push(&mut self, owner: Owner, deadline: Time) {
        self.waiting.push_back(Waiting { owner, deadline, passed: 0 });
    }
    /// Takes a request out, wherever it is.
    pub fn remove(&mut self, owner: Owner) {
        self.waiting.retain(|w| w.owner != owner);
    }
    /// Requests whose deadline has passed, taken out.
    pub fn expire(&mut self, now: Time) -> Vec<Owner> {
        let late = self.waiting.iter().filter(|w| w.deadline <= now).map(|w| w.owner).collect();
        self.waiting.retain(|w| w.deadline > now);
        late
    }
    /// The earliest deadline.
    pub fn next_deadline(&self) -> Option<Time> {
        self.waiting.iter().map(|w| w.deadline).min()
    }
    /// Tries the waiting requests in turn. `attempt(owner, pages_allowed)` admits one if it fits; with `pages_allowed` false only
    /// if it needs no page.
    pub fn run(&mut self, mut attempt: impl FnMut(Owner, bool) -> Attempt) {
        let mut at = 0;
        let mut pages_allowed = true;
        while at < self.waiting.len().min(WINDOW) {
            match attempt(self.waiting[at].owner, pages_allowed) {
                Attempt::Waits => {
                    pages_allowed &= self.waiting[at].passed < MAX_PASSED;
                    at += 1;
                }
                left => {
                    self.waiting.remove(at);
                    if left == Attempt::Left {
                        self.waiting.iter_mut().take(at).for_each(|w| w.passed += 1);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Admits what fits into `room`; returns the order of admission.
    fn run(queue: &mut Queue, sizes: &[u32], room: &mut u32) -> Vec<u64> {
        let mut order = Vec::new();
        queue.run(|Owner(o), allowed| {
            let size = sizes[o as usize];
            if size == 0 || (allowed && size <= *room) {
                *room -= size;
                order.push(o);
                return if size == 0 { Attempt::LeftFree } else { Attempt::Left };
            }
            Attempt::Waits
        });
        order
    }

    #[test]
    fn a_large_request_is_passed_a_bounded_number_of_times() {
        let mut sizes = vec![10];
        sizes.resize(100, 1);
        let mut queue = Queue::default();
        queue.push(Owner(0), Time::NEVER);
        let mut passed = 0;
        for small in 1..40 {
            queue.push(Owner(small), Time::NEVER);
            passed += run(&mut queue, &sizes, &mut 5).len() as u32;
        }
        assert_eq!(passed, MAX_PASSED, "then the rest waits behind it");
        assert_eq!(
            run(&mut queue, &sizes, &mut 12)[..3],
            [0, 17, 18],
            "and follows in order once there is room"
        );
    }

    #[test]
    fn a_request_that_needs_no_page_never_waits() {
        let sizes = [10, 10, 0];
        let mut queue = Queue::default();
        for o in 0..3 {
            queue.push(Owner(o), Time::NEVER);
        }
        queue.waiting[0].passed = MAX_PASSED;
        assert_eq!(run(&mut queue, &sizes, &mut 5), [2]);
        assert_eq!(queue.waiting[0].passed, MAX_PASSED, "it did not count as passing");
    }

    #[test]
    fn deadlines_take_requests_out() {
        let mut queue = Queue::default();
        queue.push(Owner(0), Time(10));
        queue.push(Owner(1), Time(5));
        assert_eq!(queue.next_deadline(), Some(Time(5)));
        assert_eq!(queue.expire(Time(5)), [Owner(1)]);
        assert_eq!(queue.len(), 1);
    }
}
