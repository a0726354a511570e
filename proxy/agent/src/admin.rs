//! How `shunt dump` and `shunt explain` reach the running agent: a Unix socket, one request and one answer a
//! connection, both a line of JSON. Only root can open it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::dump::DumpRequest;
use crate::explain::ExplainRequest;

/// What the running agent can be asked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Request {
    /// A dump; answered with its text.
    Dump(DumpRequest),
    /// What becomes of packets; answered with a list of answers in JSON.
    Explain(ExplainRequest),
}

/// A request on its way to the run loop, and where the answer goes.
pub(crate) struct Asked {
    pub request: Request,
    pub answer: oneshot::Sender<Result<String>>,
}

#[derive(Serialize, Deserialize)]
enum Answer {
    #[serde(rename = "ok")]
    Ok(String),
    #[serde(rename = "error")]
    Error(String),
}

/// Longest request: some 50,000 packets to explain.
const REQUEST_MAX: u64 = 8 << 20;
/// How long a request may take to arrive.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Listens; a socket file that a dead agent left behind is replaced.
pub(crate) fn listen(path: &Path, tx: mpsc::Sender<Asked>) -> Result<()> {
    let listener = bind(path).with_context(|| format!("admin socket {}", path.display()))?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let tx = tx.clone();
            tokio::spawn(async move {
                if let Err(error) = serve(stream, tx).await {
                    tracing::debug!("admin socket: {error:#}");
                }
            });
        }
    });
    Ok(())
}

fn bind(path: &Path) -> Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    if StdUnixStream::connect(path).is_ok() {
        bail!("another agent listens there");
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn serve(stream: UnixStream, tx: mpsc::Sender<Asked>) -> Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut reader = tokio::io::BufReader::new(read).take(REQUEST_MAX);
    tokio::time::timeout(REQUEST_TIMEOUT, reader.read_line(&mut line)).await??;
    let answer = match serde_json::from_str(&line) {
        _ if line.len() as u64 == REQUEST_MAX => {
            Err(anyhow!("longer than {REQUEST_MAX} bytes: ask for less"))
        }
        Ok(request) => {
            let (answer, answered) = oneshot::channel();
            tx.send(Asked { request, answer }).await?;
            answered.await?
        }
        Err(error) => Err(error.into()),
    };
    let answer = match answer {
        Ok(text) => Answer::Ok(text),
        Err(error) => Answer::Error(format!("{error:#}")),
    };
    write.write_all(serde_json::to_string(&answer)?.as_bytes()).await?;
    write.write_all(b"\n").await?;
    Ok(())
}

/// Why the running agent did not answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    #[error(
        "no running agent at {0}: start `shunt run`, name its --admin-socket, or use --manifests PATH --node NAME"
    )]
    NoAgent(String),
    #[error("the running agent hung up: {0}")]
    Broken(#[from] std::io::Error),
    #[error("cannot understand the running agent: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error("{0}")]
    Refused(String),
}

/// Asks the running agent.
pub(crate) fn ask(path: &Path, request: &Request) -> Result<String, AskError> {
    let Ok(mut stream) = StdUnixStream::connect(path) else {
        return Err(AskError::NoAgent(path.display().to_string()));
    };
    writeln!(stream, "{}", serde_json::to_string(request)?)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    match serde_json::from_str(&line)? {
        Answer::Ok(text) => Ok(text),
        Answer::Error(error) => Err(AskError::Refused(error)),
    }
}
