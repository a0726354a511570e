//! A Linux kernel for tests, apart from the machine's own: 6.1, with IPVS.
//!
//! ```text
//!   host                              guest
//!   Guest::run ──> linux.uml ───────> init.sh (PID 1) ──> the command
//!   / ──────────── read-only ───────> /      what is written goes to memory and vanishes
//!   control folder <──read-write────> /run/control: command, its status
//!   three pipes <─────────────────── the command's stdout and stderr, the console
//! ```
//!
//! The guest has a loopback interface and no other network, one CPU, and the programs of the host. It ends with
//! the command, with the timeout, and with the process that started it.
//!
//! This module must never know what is run in the guest. Start reading at [`Guest`], then [`test_in_guest`].

mod test;
mod uml;

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, PipeReader, Write, pipe};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::unistd::geteuid;

pub use test::{INSIDE, inside, require_guest, test_in_guest};

const INIT: &str = include_str!("init.sh");
/// A guest's only CPU is one that other work on the machine wants, too: builds, other tests. They can wait, while
/// a test that measures time cannot. Without the privilege `nice` says so and goes on.
const PRIORITY: &str = "-10";
const POLL: Duration = Duration::from_millis(5);
/// How many of the console's last lines an error shows.
const CONSOLE_LINES: usize = 40;

/// How to run commands in a guest kernel.
///
/// ```no_run
/// # fn main() -> anyhow::Result<()> {
/// use shunt_harness::guest::Guest;
/// use std::process::Command;
///
/// let output = Guest::new()?.run(Command::new("ipvsadm").arg("-Sn"))?;
/// assert!(output.status.success());
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Guest {
    kernel: uml::Kernel,
    memory_mib: u32,
    timeout: Duration,
}

impl Guest {
    /// A guest with 1 GiB of memory (taken as it is used) and twelve minutes for a command. The error names what this
    /// machine lacks, and how to install it.
    pub fn new() -> Result<Self> {
        ensure!(geteuid().is_root(), "no guest kernel: that needs root");
        Ok(Self { kernel: uml::Kernel::find()?, memory_mib: 1024, timeout: Duration::from_mins(12) })
    }

    /// With so much memory, in MiB.
    #[must_use]
    pub fn memory(self, mib: u32) -> Self {
        Self { memory_mib: mib, ..self }
    }

    /// With so much time for a command, the start of the guest included.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Runs a command in a new guest and gathers its output. An error means that the guest failed or the time was
    /// up, not that the command failed.
    ///
    /// Of `command`, its program, arguments, environment and directory count. The caller's environment does not
    /// reach the guest; the directory is the caller's unless the command says otherwise.
    pub fn run(&self, command: &Command) -> Result<Output> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        match self.pass(command, &mut stdout, &mut stderr) {
            Ok(status) => Ok(Output { status, stdout, stderr }),
            Err(error) => {
                let output =
                    [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
                Err(error.context(format!("{} in a guest\n{output}", command.get_program().display())))
            }
        }
    }

    /// Runs a command as [`Guest::run`] does; what it says is passed on as it comes.
    pub fn pass(
        &self,
        command: &Command,
        mut stdout: impl Write + Send,
        mut stderr: impl Write + Send,
    ) -> Result<ExitStatus> {
        let folder = tempfile::Builder::new().prefix("guest-").tempdir().context("make a control folder")?;
        let control = folder.path();
        // It becomes part of the kernel's command line.
        let plain = |byte: &u8| byte.is_ascii_graphic() && !b"\"',\\".contains(byte);
        ensure!(
            control.as_os_str().as_bytes().iter().all(plain),
            "unusable folder name {}",
            control.display()
        );
        self.write_control(control, command)?;

        let (mut out, out_end) = pipe()?;
        let (mut err, err_end) = pipe()?;
        let (console, console_end) = pipe()?;
        let mut machine = guarded(&self.kernel.command(control, self.memory_mib)?);
        machine.stdin(console_end).stdout(out_end).stderr(err_end);
        let panicked = AtomicBool::new(false);
        let (ended, console) = thread::scope(|scope| {
            // The kernel counts the end of the thread that started it as its parent's, so this one waits, too.
            let machine = scope.spawn(|| {
                let mut machine = machine;
                uml::Kernel::pin();
                let running = Running(machine.spawn().context("start the guest")?);
                // With it go our ends of the pipes.
                drop(machine);
                running.wait(self.timeout, &panicked)
            });
            let out = scope.spawn(move || io::copy(&mut out, &mut stdout));
            let err = scope.spawn(move || io::copy(&mut err, &mut stderr));
            let console = read_console(console, &panicked)?;
            joined(out)?.context("pass the output on")?;
            joined(err)?.context("pass the error output on")?;
            Ok::<_, anyhow::Error>((joined(machine)??, console))
        })?;
        match fs::read_to_string(control.join("status")) {
            Ok(status) => {
                let status: i32 = status.trim().parse().with_context(|| format!("status {status:?}"))?;
                Ok(ExitStatus::from_raw(status << 8))
            }
            Err(_) if !ended => bail!("not done after {:?}; its console:\n{console}", self.timeout),
            Err(_) => bail!("the guest ended without a result; its console:\n{console}"),
        }
    }

    /// Writes what the kernel is loaded with, and what init.sh reads.
    fn write_control(&self, control: &Path, command: &Command) -> Result<()> {
        let init = control.join("init");
        fs::write(&init, INIT)?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
        fs::write(control.join("xstate.so"), uml::XSTATE)?;
        let modules = quoted(self.kernel.modules().as_os_str())?;
        fs::write(control.join("conf"), format!("modules={modules}\n"))?;

        let directory =
            command.get_current_dir().map_or_else(std::env::current_dir, |path| Ok(path.to_owned()))?;
        let mut script = format!("cd {} || exit 125\n", quoted(directory.as_os_str())?);
        for (key, value) in command.get_envs() {
            let key = key.to_str().filter(|key| is_variable(key));
            let key = key.context("a variable's name must be a plain word")?;
            match value {
                Some(value) => writeln!(script, "export {key}={}", quoted(value)?)?,
                None => writeln!(script, "unset {key}")?,
            }
        }
        write!(script, "exec {}", quoted(command.get_program())?)?;
        for argument in command.get_args() {
            write!(script, " {}", quoted(argument)?)?;
        }
        script.push('\n');
        fs::write(control.join("command"), script)?;
        Ok(())
    }
}

/// The guest; dropping this ends it.
struct Running(Child);

impl Running {
    /// Waits for it to end; false when the time was up. A kernel that panicked goes no further and is not waited for.
    fn wait(mut self, timeout: Duration, panicked: &AtomicBool) -> Result<bool> {
        let deadline = Instant::now() + timeout;
        while self.0.try_wait()?.is_none() && !panicked.load(Ordering::Relaxed) {
            if Instant::now() > deadline {
                return Ok(false);
            }
            thread::sleep(POLL);
        }
        Ok(true)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // After its end these do nothing.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The command, made to die with this process, and all that it starts with it (a PID namespace does that: UML's
/// helper processes would live on); given the three pipes where the kernel looks for them: the command's output as
/// descriptors 3 and 4, the console in place of its own output.
fn guarded(machine: &Command) -> Command {
    let mut command = Command::new("nice");
    command.args([
        "-n",
        PRIORITY,
        "--",
        "setpriv",
        "--pdeathsig",
        "KILL",
        "--",
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        "--",
        "sh",
        "-c",
    ]);
    command.arg("exec \"$@\" 3>&1 4>&2 >&0 2>&0 </dev/null").arg("sh");
    command.arg(machine.get_program()).args(machine.get_args());
    for (key, value) in machine.get_envs() {
        command.env(key, value.unwrap_or_default());
    }
    command
}

/// A word of a shell script that means exactly this text.
fn quoted(text: &OsStr) -> Result<String> {
    let text = text.to_str().with_context(|| format!("not UTF-8: {}", text.display()))?;
    Ok(format!("'{}'", text.replace('\'', r"'\''")))
}

fn is_variable(key: &str) -> bool {
    !key.starts_with(|c: char| c.is_ascii_digit())
        && key.chars().all(|c| c == '_' || c.is_ascii_alphanumeric())
        && !key.is_empty()
}

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> Result<T> {
    thread.join().map_err(|_| anyhow!("a thread of the guest's runner panicked"))
}

/// Reads the console to its end, and gives its last lines; says at once when the kernel panicked.
fn read_console(console: PipeReader, panicked: &AtomicBool) -> Result<String> {
    let mut lines = VecDeque::new();
    for line in BufReader::new(console).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).trim_end().to_owned();
        if line.starts_with("Kernel panic") {
            panicked.store(true, Ordering::Relaxed);
        }
        if lines.len() == CONSOLE_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }
    Ok(Vec::from(lines).join("\n"))
}

/// The program of this name that `PATH` leads to.
fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|program| program.is_file())
}
