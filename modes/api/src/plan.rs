//! Plans: what to do to the kernel, as values that can be printed before they are carried out.

use std::fmt;

/// Operations that the kernel carries out together or not at all.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Transaction<Op> {
    /// The operations, in order.
    pub ops: Vec<Op>,
}

/// Ordered transactions that lead from what was observed to what is desired.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan<Op> {
    /// The transactions, in order.
    pub transactions: Vec<Transaction<Op>>,
    /// What is desired but cannot be had, a sentence each, beginning with the Service port as
    /// `namespace/name:port` and a colon: a map of the kernel is full.
    pub problems: Vec<String>,
}

impl<Op> Default for Plan<Op> {
    fn default() -> Self {
        Self { transactions: Vec::new(), problems: Vec::new() }
    }
}

impl<Op> Plan<Op> {
    /// True when there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.transactions.is_empty()
    }

    /// Number of operations in all transactions.
    pub fn len(&self) -> usize {
        self.transactions.iter().map(|t| t.ops.len()).sum()
    }

    /// Appends a transaction unless it is empty.
    pub fn push(&mut self, ops: Vec<Op>) {
        if !ops.is_empty() {
            self.transactions.push(Transaction { ops });
        }
    }
}

impl<Op: fmt::Display> fmt::Display for Plan<Op> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in &self.problems {
            writeln!(f, "# {problem}")?;
        }
        if self.is_empty() {
            return f.write_str("# nothing to do\n");
        }
        for (i, transaction) in self.transactions.iter().enumerate() {
            writeln!(f, "# transaction {} of {}", i + 1, self.transactions.len())?;
            for op in &transaction.ops {
                writeln!(f, "{op}")?;
            }
        }
        Ok(())
    }
}
