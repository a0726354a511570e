//! The only module that touches the kernel.

use shunt_mode::{KernelError, Unsupported};

use crate::op::Op;
use crate::state::State;

/// What the mode needs of a kernel, in the mode's own types.
pub trait Kernel {
    /// Whether this kernel has what the mode needs.
    fn probe(&mut self) -> Result<(), Unsupported>;
    /// Reads what the maps hold for the family.
    fn observe(&mut self) -> Result<State, KernelError>;
    /// Carries out operations in order. After an error those before the one that failed have their
    /// effect.
    fn carry_out(&mut self, ops: &[Op]) -> Result<(), KernelError>;
    /// Removes programs and maps of both families if they are there.
    fn remove(&mut self) -> Result<(), KernelError>;
}
