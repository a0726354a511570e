//! A program running in a namespace which does not outlive its test.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::lock;
use super::namespace::Namespace;

/// How long a program may take to end after SIGTERM before it is killed.
const PATIENCE: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(2);

type Output = Arc<Mutex<Vec<u8>>>;

/// A child process with its output gathered; dropping it ends the process (SIGTERM, later SIGKILL) and waits for it.
///
/// The process also ends when this one is killed: it asks the kernel for SIGKILL at its parent's death (through
/// `setpriv`, where that is installed).
#[derive(Debug)]
pub struct ChildGuard {
    name: String,
    child: Child,
    stdout: Output,
    stderr: Output,
    /// Dropping it ends the thread which started the child. The kernel counts that thread's end as the parent's.
    _parent: Sender<()>,
}

impl Namespace {
    /// Starts a program inside, without input, its output gathered.
    ///
    /// Of `command`, its program, arguments, environment changes and directory count.
    pub fn spawn(&self, command: &Command) -> Result<ChildGuard> {
        let name = command.get_program().to_string_lossy().into_owned();
        let (mut child, parent) = self.spawn_from_lasting_thread(guarded(command), &name)?;
        let stdout = gather(child.stdout.take().context("stdout is piped")?)?;
        let stderr = gather(child.stderr.take().context("stderr is piped")?)?;
        Ok(ChildGuard { name, child, stdout, stderr, _parent: parent })
    }

    fn spawn_from_lasting_thread(&self, mut command: Command, name: &str) -> Result<(Child, Sender<()>)> {
        let (sender, receiver) = channel();
        let (parent, end): (Sender<()>, Receiver<()>) = channel();
        self.thread(move || {
            if sender.send(command.spawn()).is_ok() {
                // Ends with an error once the guard is gone; that is the signal.
                let _ = end.recv();
            }
            Ok(())
        })?;
        let child = receiver.recv().context("the parent thread ended")?;
        Ok((child.with_context(|| format!("start {name} in {}", self.name()))?, parent))
    }
}

/// The same command, wrapped so that it dies with its parent.
fn guarded(command: &Command) -> Command {
    let mut guarded = if has_setpriv() {
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program());
        setpriv
    } else {
        Command::new(command.get_program())
    };
    guarded.args(command.get_args()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => guarded.env(key, value),
            None => guarded.env_remove(key),
        };
    }
    if let Some(directory) = command.get_current_dir() {
        guarded.current_dir(directory);
    }
    guarded
}

fn has_setpriv() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join("setpriv").is_file())
}

/// Reads a pipe to its end on a thread of its own. Nobody waits for that thread: a grandchild may keep the pipe.
fn gather(mut pipe: impl Read + Send + 'static) -> Result<Output> {
    let output = Output::default();
    let buffer = Arc::clone(&output);
    thread::Builder::new().name("output".to_owned()).spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(length @ 1..) = pipe.read(&mut chunk) {
            lock(&buffer).extend_from_slice(&chunk[..length]);
        }
    })?;
    Ok(output)
}

impl ChildGuard {
    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to its standard output so far.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&lock(&self.stdout)).into_owned()
    }

    /// What it has written to its standard error so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&lock(&self.stderr)).into_owned()
    }

    /// How it ended, if it has.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for it to end.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                self.read_out();
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{self}: still running after {timeout:?}");
            }
            thread::sleep(POLL);
        }
    }

    /// Waits until what it wrote before it ended is read; not for long, as a grandchild may keep the pipes.
    fn read_out(&self) {
        const MOST: Duration = Duration::from_secs(1);
        let since = Instant::now();
        // Whoever reads has the other reference.
        while [&self.stdout, &self.stderr].into_iter().any(|output| Arc::strong_count(output) > 1)
            && since.elapsed() < MOST
        {
            thread::sleep(POLL);
        }
    }

    /// Waits until its output, standard or error, contains `text`; fails when it ends before.
    pub fn wait_for(&mut self, text: &str, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            // Looked at before the output, so that the last words of a program that ended are not missed.
            let ended = self.child.try_wait()?;
            if ended.is_some() {
                self.read_out();
            }
            if self.stdout().contains(text) || self.stderr().contains(text) {
                return Ok(());
            }
            if let Some(status) = ended {
                bail!("{self}: ended with {status} before saying {text:?}");
            }
            if Instant::now() > deadline {
                bail!("{self}: has not said {text:?} after {timeout:?}");
            }
            thread::sleep(POLL);
        }
    }

    /// Sends it a signal.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        // A process that ended and was waited for has given its number back.
        if self.child.try_wait()?.is_none() {
            kill(Pid::from_raw(self.child.id().cast_signed()), signal)?;
        }
        Ok(())
    }

    /// Ends it: SIGTERM, and SIGKILL if it has not ended in time.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        if let Ok(status) = self.wait(PATIENCE) {
            return Ok(status);
        }
        self.kill()
    }

    /// Ends it at once (SIGKILL), as a crash would.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill()?;
        Ok(self.child.wait()?)
    }
}

impl std::fmt::Display for ChildGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (process {})", self.name, self.child.id())?;
        for (name, text) in [("stdout", self.stdout()), ("stderr", self.stderr())] {
            if !text.is_empty() {
                write!(f, "\n--- {name}\n{text}---\n")?;
            }
        }
        Ok(())
    }
}

impl Drop for ChildGuard {
    fn drop(&mut self) {
        let status = self.stop();
        if thread::panicking() {
            let how = status.map_or_else(
                |error| error.to_string(),
                |status| match status.signal() {
                    Some(signal) => format!("signal {signal}"),
                    None => status.to_string(),
                },
            );
            eprintln!("{self}\nended with {how}");
        }
    }
}
