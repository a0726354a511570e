//! Events (`events.k8s.io/v1`) about Services and the own Node, for `kubectl describe`.
//!
//! They are best effort: one that cannot be delivered is logged and forgotten, and nothing waits for it.

use jiff::Timestamp;
use kube::client::Body;
use serde_json::json;
use tokio::sync::mpsc;

use crate::api::{KubeOptions, connect};
use crate::error::WatchError;

/// How much an event matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EventType {
    /// All is well.
    Normal,
    /// Somebody should look.
    Warning,
}

/// What an event is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Regarding {
    /// The own Node.
    Node,
    /// A Service.
    Service {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
}

/// One event.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Notice {
    /// What it is about.
    pub regarding: Regarding,
    /// How much it matters.
    pub event_type: EventType,
    /// Why, in one word: `Starting`.
    pub reason: &'static str,
    /// What was being done, in one word.
    pub action: &'static str,
    /// For people.
    pub note: String,
}

/// The longest note that the API takes.
const NOTE_MAX: usize = 1024;

/// Sends what it gets until the other end is dropped. Returns an error only if the client cannot be
/// made.
pub async fn send_events(
    options: KubeOptions,
    mut notices: mpsc::Receiver<Notice>,
) -> Result<(), WatchError> {
    let client = connect(&options).await?;
    while let Some(notice) = notices.recv().await {
        let (namespace, event) = event(&notice, &options.node_name, Timestamp::now());
        let request = http::Request::post(format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events"))
            .header(http::header::CONTENT_TYPE, "application/json")
            .header(http::header::ACCEPT, "application/json")
            .body(Body::from(event.to_string().into_bytes()));
        let Ok(request) = request else { continue };
        let sent = tokio::time::timeout(options.response_timeout, client.send(request)).await;
        match sent {
            Ok(Ok(response)) if response.status().is_success() => {}
            Ok(Ok(response)) => {
                tracing::debug!("event {}: the API server answered {}", notice.reason, response.status());
            }
            Ok(Err(error)) => tracing::debug!("event {}: {error}", notice.reason),
            Err(_) => tracing::debug!("event {}: no answer in time", notice.reason),
        }
    }
    Ok(())
}

/// The API object, and its namespace: that of the Service, and `default` for Nodes.
fn event(notice: &Notice, node: &str, now: Timestamp) -> (String, serde_json::Value) {
    let (namespace, regarding) = match &notice.regarding {
        Regarding::Node => ("default", json!({ "kind": "Node", "name": node, "uid": node })),
        Regarding::Service { namespace, name } => (
            namespace.as_str(),
            json!({ "kind": "Service", "apiVersion": "v1", "namespace": namespace, "name": name }),
        ),
    };
    let name = regarding["name"].as_str().unwrap_or_default();
    let mut note = notice.note.clone();
    note.truncate((0..=NOTE_MAX).rev().find(|at| note.is_char_boundary(*at)).unwrap_or(0));
    let event = json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        // As client-go names them: the object's name and the time in nanoseconds.
        "metadata": { "name": format!("{name}.{:x}", now.as_nanosecond()), "namespace": namespace },
        "eventTime": format!("{now:.6}"),
        "reportingController": "kube-proxy",
        "reportingInstance": format!("kube-proxy-{node}"),
        "action": notice.action,
        "reason": notice.reason,
        "regarding": regarding,
        "note": note,
        "type": match notice.event_type {
            EventType::Normal => "Normal",
            EventType::Warning => "Warning",
        },
    });
    (namespace.to_owned(), event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_as_the_api_wants_them() {
        let notice = Notice {
            regarding: Regarding::Service { namespace: "ns".to_owned(), name: "web".to_owned() },
            event_type: EventType::Warning,
            reason: "FailedToStartServiceHealthcheck",
            action: "Listen",
            note: "é".repeat(600),
        };
        let (namespace, event) = event(&notice, "worker-1", Timestamp::from_second(1_795_000_000).unwrap());
        assert_eq!(namespace, "ns");
        assert_eq!(event["eventTime"], "2026-11-18T11:06:40.000000Z");
        assert_eq!(event["note"].as_str().unwrap().len(), NOTE_MAX);
        assert_eq!(event["metadata"]["name"], "web.18e91efd5bd38000");
    }
}
