//! ● How much of a server's lock table the agent may take, which all transactions of the server share: one that finds it full fails.

/// The size of a server's lock table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LockTable {
    /// `max_locks_per_transaction`
    pub(super) per_transaction: usize,
    /// As many transactions as it is made for.
    pub(super) transactions: usize,
}

impl LockTable {
    /// What a transaction that alters the publication takes at most, as a part of the whole.
    const SHARE: usize = 20;

    /// Nor are more tables than that locked together, however large the table is.
    const AT_ONCE_MAX: usize = 200;

    /// Locks it has room for. PostgreSQL adds something for safety, which is not counted on.
    fn room(self) -> usize {
        self.per_transaction.saturating_mul(self.transactions)
    }

    /// How many tables are locked in one transaction that alters the publication.
    pub(super) fn at_once(self) -> usize {
        (self.room() / Self::SHARE).clamp(1, Self::AT_ONCE_MAX)
    }

    /// The `max_locks_per_transaction` that a copy of that many tables needs, where this is too small for it: the copy and
    /// `pg_dump` each lock all of them at once, and a tenth stays for everybody else.
    pub(super) fn lacks(self, tables: usize) -> Option<usize> {
        let needed = tables.saturating_mul(2).saturating_mul(10) / 9;
        (needed > self.room()).then(|| needed.div_ceil(self.transactions.max(1)) + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_takes_a_part_and_refuses_what_would_not_fit() {
        let of = |per_transaction| LockTable {
            per_transaction,
            transactions: 122,
        };
        for (per_transaction, tables, at_once, lacks) in [
            (64, 1_200, 200, None),
            (64, 3_500, 200, None),
            (10, 100, 61, None),
            (10, 1_200, 61, Some(23)),
            (1, 10_000, 6, Some(184)),
        ] {
            let table = of(per_transaction);
            assert_eq!(table.at_once(), at_once, "{per_transaction}");
            assert_eq!(table.lacks(tables), lacks, "{per_transaction} {tables}");
        }
        let wanted = of(10).lacks(1_200).unwrap();
        assert_eq!(of(wanted).lacks(1_200), None);
    }
}
