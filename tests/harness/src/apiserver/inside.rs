//! The server inside a network namespace, for programs that run there.

use std::ops::Deref;
use std::sync::mpsc;
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use tokio::sync::oneshot;

use super::ApiServer;
use crate::lab::Namespace;

/// A server on a thread of its own; gone when dropped.
pub struct ApiServerInside {
    server: ApiServer,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl ApiServer {
    /// Starts a server without objects on a free port of 127.0.0.1 of a namespace.
    pub fn start_inside(namespace: &Namespace) -> Result<ApiServerInside> {
        let (started, server) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let thread = namespace.thread(move || {
            tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
                started.send(Self::start().await?).ok();
                let _ = stopped.await;
                Ok(())
            })
        })?;
        let server = server.recv().context("the API server did not start")?;
        Ok(ApiServerInside { server, stop: Some(stop), thread: Some(thread) })
    }
}

impl Deref for ApiServerInside {
    type Target = ApiServer;

    fn deref(&self) -> &ApiServer {
        &self.server
    }
}

impl Drop for ApiServerInside {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}
