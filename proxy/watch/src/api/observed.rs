//! What is told of every request to the API server.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::Connect;
use kube::client::Body;
use tower::Service;

/// A request to the API server of which the answer has begun, or that failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answered {
    /// HTTP method.
    pub method: String,
    /// Host and port of the server.
    pub host: String,
    /// HTTP status; `None` if there was no answer.
    pub status: Option<u16>,
    /// How long that took.
    pub took: Duration,
}

/// Somebody who wants to know; must not wait.
#[derive(Clone)]
pub struct Observer(Arc<dyn Fn(&Answered) + Send + Sync>);

impl Observer {
    /// Calls a function with every request that was answered.
    pub fn new(observe: impl Fn(&Answered) + Send + Sync + 'static) -> Self {
        Self(Arc::new(observe))
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

/// The client, observed.
pub(super) fn observed<C: Connect + Clone + Send + Sync + 'static>(
    client: Client<C, Body>,
    observer: Option<Observer>,
) -> impl Service<
    http::Request<Body>,
    Response = http::Response<hyper::body::Incoming>,
    Error = hyper_util::client::legacy::Error,
    Future: Send,
> + Clone
+ Send {
    tower::service_fn(move |request: http::Request<Body>| {
        let (method, host) =
            (request.method().to_string(), request.uri().authority().map(ToString::to_string));
        let observer = observer.clone();
        let started = Instant::now();
        let answer = client.request(request);
        async move {
            let answer = answer.await;
            if let Some(Observer(observe)) = observer {
                let status = answer.as_ref().ok().map(|response| response.status().as_u16());
                let took = started.elapsed();
                observe(&Answered { method, host: host.unwrap_or_default(), status, took });
            }
            answer
        }
    })
}
