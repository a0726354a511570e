//! A server on a thread of its own, for tests that are not asynchronous.

use std::ops::Deref;
use std::sync::mpsc;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use tokio::sync::oneshot;

use super::ApiServer;
use crate::lab::Namespace;

/// An [`ApiServer`] that listens inside a namespace until this is dropped.
pub struct ResidentServer {
    server: ApiServer,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl ApiServer {
    /// Starts a server on loopback inside a namespace.
    pub fn start_in(namespace: &Namespace) -> Result<ResidentServer> {
        let (started, server) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let thread = namespace.thread(move || {
            tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
                started.send(Self::start().await?).ok();
                // Ends with an error once the sender is gone; that is the signal.
                let _ = stopped.await;
                Ok(())
            })
        })?;
        let server = server.recv().context("the API server did not start")?;
        Ok(ResidentServer { server, stop: Some(stop), thread: Some(thread) })
    }
}

impl Deref for ResidentServer {
    type Target = ApiServer;

    fn deref(&self) -> &ApiServer {
        &self.server
    }
}

impl Drop for ResidentServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
