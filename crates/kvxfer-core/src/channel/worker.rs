//! A thread that computes digests, so that neither the progress thread nor a mover does.

use crate::{Error, Result};
use crossbeam::channel::{Sender, unbounded};
use parking_lot::Mutex;

type Job = Box<dyn FnOnce() + Send>;

/// Started with the first job; ends when this is dropped, after the jobs it was given.
pub(super) struct Worker {
    name: &'static str,
    jobs: Mutex<Option<Sender<Job>>>,
}

impl Worker {
    pub(super) fn new(name: &'static str) -> Self {
        Self { name, jobs: Mutex::new(None) }
    }

    /// Runs `job` on the thread, after those before it.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) -> Result<()> {
        let mut jobs = self.jobs.lock();
        if jobs.is_none() {
            let (sender, receiver) = unbounded::<Job>();
            crate::threads::spawn(self.name, move || receiver.into_iter().for_each(|job| job())).map_err(
                |e| Error::system("starting a thread for digests", e, "raise the limit on threads"),
            )?;
            *jobs = Some(sender);
        }
        if let Some(jobs) = jobs.as_ref() {
            // The thread ends after its sender only, so somebody is listening.
            let _ = jobs.send(Box::new(job));
        }
        Ok(())
    }
}
