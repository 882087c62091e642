//! A channel's hold on its agent.
//!
//! The last handle of an agent joins the agent's threads, so it must never be dropped by one of them. A channel is called
//! from those threads and may be dropped there; so the hold is released by the user's own handle, on the user's thread, and
//! what the agent's threads may still drop afterwards holds no agent.

use crate::Agent;
use crate::agent::host;
use kvxfer_proto::Time;
use parking_lot::Mutex;

/// An agent, until it is released.
pub(super) struct Anchor(Mutex<Option<Agent>>);

impl Anchor {
    pub(super) fn new(agent: &Agent) -> Self {
        Self(Mutex::new(Some(agent.clone())))
    }

    /// Makes the progress thread ask the channel's tick, at the latest then.
    pub(super) fn schedule(&self, latest: Time) {
        // Called under the lock, so that no clone of the agent can outlive its release on this thread.
        if let Some(agent) = self.0.lock().as_ref() {
            agent.schedule(host::to_instant(latest));
        }
    }

    /// Lets go of the agent. Called on a thread of the user.
    pub(super) fn release(&self) {
        let agent = self.0.lock().take();
        drop(agent);
    }
}

impl Drop for Anchor {
    fn drop(&mut self) {
        if let Some(agent) = self.0.get_mut().take() {
            // Nobody released it: this may be a thread of the agent.
            std::thread::spawn(move || drop(agent));
        }
    }
}
