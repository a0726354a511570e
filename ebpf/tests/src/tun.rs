//! A device without Ethernet headers, of which the test is the other end.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::libc;

/// The other end of a TUN device.
#[derive(Debug)]
pub struct Tun {
    file: File,
}

impl Tun {
    /// Makes a device in the calling thread's namespace; it is gone with `self`.
    pub fn create(name: &str) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .context("/dev/net/tun")?;
        let mut request = [0_u8; size_of::<libc::ifreq>()];
        request[..name.len()].copy_from_slice(name.as_bytes());
        let flags = i16::try_from(libc::IFF_TUN | libc::IFF_NO_PI)?;
        request[libc::IFNAMSIZ..libc::IFNAMSIZ + 2].copy_from_slice(&flags.to_ne_bytes());
        // SAFETY: the kernel reads and writes an `ifreq`, for which there is room.
        #[allow(unsafe_code)]
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
        nix::errno::Errno::result(result).context("TUNSETIFF")?;
        Ok(Self { file })
    }

    /// Lets an IP packet come in by the device.
    pub fn send(&mut self, packet: &[u8]) -> Result<()> {
        Ok(self.file.write_all(packet)?)
    }

    /// The next IP packet that leaves by the device and is not of the kernel's own making at its start
    /// (router solicitations and the like).
    pub fn receive(&mut self, wanted: fn(&[u8]) -> bool) -> Result<Vec<u8>> {
        let deadline = Instant::now() + Duration::from_secs(1);
        let mut buffer = [0; 2048];
        while Instant::now() < deadline {
            match self.file.read(&mut buffer) {
                Ok(length) if wanted(&buffer[..length]) => return Ok(buffer[..length].to_vec()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => sleep(Duration::from_millis(2)),
                Err(error) => return Err(error.into()),
            }
        }
        bail!("nothing came out of the device")
    }
}
