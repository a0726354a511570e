//! Network namespaces, and programs in them.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, BufWriter, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, ExitStatus, Stdio};
use std::thread;

use nix::sched::{CloneFlags, setns};

/// Where tools may be besides `PATH`, which a service manager may have cut down.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

/// A network namespace.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// The calling thread's.
    pub fn current() -> io::Result<Self> {
        File::open(OWN_NAMESPACE).map(Self)
    }

    /// Does something on a thread that is in the namespace. Entering another one than the caller's needs
    /// `CAP_SYS_ADMIN`, which only tests have.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        let (here, there) = (std::fs::metadata(OWN_NAMESPACE)?, self.0.metadata()?);
        if (here.dev(), here.ino()) == (there.dev(), there.ino()) {
            return work();
        }
        thread::scope(|scope| {
            let thread = thread::Builder::new().spawn_scoped(scope, || {
                setns(&self.0, CloneFlags::CLONE_NEWNET)?;
                work()
            })?;
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
        })
    }

    /// Runs a program to its end, feeding it `input`, which is written while it reads. An error also says what the
    /// program said.
    pub fn run(&self, program: &Path, args: &[&str], input: Option<&Input<'_>>) -> io::Result<String> {
        let mut printed = Vec::new();
        self.converse(program, args, input, |mut output| output.read_to_end(&mut printed).map(drop))?;
        Ok(String::from_utf8_lossy(&printed).into_owned())
    }

    /// Runs a program to its end, handing over what it prints line by line.
    pub fn run_lines(&self, program: &Path, line: &mut (dyn FnMut(&str) + Send)) -> io::Result<()> {
        self.converse(program, &[], None, |output| {
            let (mut output, mut printed) = (BufReader::new(output), Vec::new());
            while output.read_until(b'\n', &mut printed)? > 0 {
                line(String::from_utf8_lossy(&printed).trim_end_matches('\n'));
                printed.clear();
            }
            Ok(())
        })
    }

    fn converse(
        &self,
        program: &Path,
        args: &[&str],
        input: Option<&Input<'_>>,
        listen: impl FnOnce(ChildStdout) -> io::Result<()> + Send,
    ) -> io::Result<()> {
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        let ended = self.inside(|| converse(program, args, input, listen));
        let (status, said) =
            ended.map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))?;
        if status.success() {
            return Ok(());
        }
        Err(io::Error::other(format!("{name}: {status}: {}", said.trim())))
    }
}

/// What a program is given.
pub type Input<'a> = dyn fmt::Display + Sync + 'a;

/// Bytes that are written at once: as much as a pipe holds.
const CHUNK: usize = 1 << 16;

fn converse(
    program: &Path,
    args: &[&str],
    input: Option<&Input<'_>>,
    listen: impl FnOnce(ChildStdout) -> io::Result<()>,
) -> io::Result<(ExitStatus, String)> {
    let mut child = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        // Beside reading, so that neither side waits for the other with full pipes. A program that ends
        // without reading its input says why by its status.
        scope.spawn(move || {
            let (Some(stdin), Some(input)) = (stdin, input) else { return Ok(()) };
            let mut stdin = BufWriter::with_capacity(CHUNK, stdin);
            write!(stdin, "{input}")?;
            stdin.flush()
        });
        let said = scope.spawn(move || {
            let mut said = Vec::new();
            // What cannot be read is not said.
            let _ = stderr.map(|mut stderr| stderr.read_to_end(&mut said));
            String::from_utf8_lossy(&said).into_owned()
        });
        let heard = stdout.map_or(Ok(()), listen);
        let status = child.wait()?;
        heard?;
        Ok((status, said.join().unwrap_or_default()))
    })
}

/// Where a program is.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(FOLDERS.map(PathBuf::from));
    folders.map(|folder| folder.join(name)).find(|file| file.is_file())
}
