//! Who changed what, when: one row a change, each bound to the one before by its hash.
//!
//! The hash of a row covers its network, number, time, words and the previous row's hash, so a
//! row that is altered, dropped or put in later breaks the chain from there on ([`Chain`]). The
//! schema refuses changes and deletions as well; the chain also shows what was done around it.

use super::{NetworkRow, Row, StoreError, Timestamp, Tx};
use proto::id::NetworkId;
use sha2::{Digest, Sha256};

/// What is to be noted.
pub struct AuditEntry<'a> {
    /// Who: a local user of the coordinator's machine, a node, or the coordinator itself.
    pub actor: &'a str,
    /// What was done, as `noun.verb`.
    pub action: &'a str,
    /// To what.
    pub subject: &'a str,
    /// The state before, or nothing.
    pub before: &'a str,
    /// The state after, or nothing.
    pub after: &'a str,
}

/// A note as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditRow {
    /// Its place in the network's log, from 1.
    pub number: u64,
    /// When.
    pub at: Timestamp,
    /// See [`AuditEntry::actor`].
    pub actor: String,
    /// See [`AuditEntry::action`].
    pub action: String,
    /// See [`AuditEntry::subject`].
    pub subject: String,
    /// See [`AuditEntry::before`].
    pub before: String,
    /// See [`AuditEntry::after`].
    pub after: String,
    /// Hash of the row before; zero for the first.
    pub previous: [u8; 32],
    /// Hash of this row.
    pub hash: [u8; 32],
}

/// Whether a log is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chain {
    /// Every row is as it was written, and none is missing.
    Whole,
    /// The row at this place is not the one that was written there.
    Broken {
        /// See [`AuditRow::number`].
        number: u64,
    },
}

impl Chain {
    /// The first row that is not the one that was written there, if any.
    #[must_use]
    pub fn broken_at(self) -> Option<u64> {
        match self {
            Self::Whole => None,
            Self::Broken { number } => Some(number),
        }
    }
}

impl AuditRow {
    fn expected_hash(&self, network: NetworkId) -> [u8; 32] {
        let mut sha = Sha256::new();
        sha.update(b"weir audit v1");
        sha.update(network.0.to_be_bytes());
        sha.update(self.number.to_be_bytes());
        sha.update(self.at.0.to_be_bytes());
        for text in [
            &self.actor,
            &self.action,
            &self.subject,
            &self.before,
            &self.after,
        ] {
            // Lengths keep the border between two texts where it is.
            sha.update((text.len() as u64).to_be_bytes());
            sha.update(text);
        }
        sha.update(self.previous);
        sha.finalize().into()
    }
}

impl Tx {
    /// Adds a note to the network's log.
    ///
    /// # Errors
    /// The database's.
    pub async fn append_audit(
        &mut self,
        network: &NetworkRow,
        now: Timestamp,
        entry: &AuditEntry<'_>,
    ) -> Result<(), StoreError> {
        let id = network.id;
        let (count, previous) = self.audit_head(id).await?;
        let mut row = AuditRow {
            number: count + 1,
            at: now,
            actor: entry.actor.to_owned(),
            action: entry.action.to_owned(),
            subject: entry.subject.to_owned(),
            before: entry.before.to_owned(),
            after: entry.after.to_owned(),
            previous,
            hash: [0; 32],
        };
        row.hash = row.expected_hash(id);
        let number = row.number.cast_signed();
        self.execute(
            "INSERT INTO audit (network, number, at, actor, action, subject, before, after, \
             previous, hash) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            &[
                id.into(),
                number.into(),
                row.at.into(),
                row.actor.into(),
                row.action.into(),
                row.subject.into(),
                row.before.into(),
                row.after.into(),
                (&row.previous).into(),
                (&row.hash).into(),
            ],
        )
        .await?;
        let sql = "UPDATE networks SET audit_count = $2, audit_head = $3 WHERE id = $1";
        self.execute(sql, &[id.into(), number.into(), (&row.hash).into()])
            .await?;
        Ok(())
    }

    /// The network's log, oldest first, and whether it is whole.
    ///
    /// # Errors
    /// The database's.
    pub async fn audit(&mut self, id: NetworkId) -> Result<(Vec<AuditRow>, Chain), StoreError> {
        let sql = "SELECT number, at, actor, action, subject, before, after, previous, hash \
                   FROM audit WHERE network = $1 ORDER BY number";
        let rows = self.rows(sql, &[id.into()]).await?;
        let rows = rows.iter().map(audit_row).collect::<Result<Vec<_>, _>>()?;
        let (count, head) = self.audit_head(id).await?;
        let chain = check(id, &rows, count, head);
        Ok((rows, chain))
    }

    async fn audit_head(&mut self, id: NetworkId) -> Result<(u64, [u8; 32]), StoreError> {
        let sql = "SELECT audit_count, audit_head FROM networks WHERE id = $1";
        let row = self.row(sql, &[id.into()]).await?;
        let row = row.ok_or(StoreError::Corrupt {
            column: "audit_head",
        })?;
        Ok((row.unsigned("audit_count")?, row.bytes("audit_head")?))
    }
}

fn check(id: NetworkId, rows: &[AuditRow], count: u64, head: [u8; 32]) -> Chain {
    let mut previous = [0; 32];
    for (number, row) in (1..).zip(rows) {
        let whole =
            row.number == number && row.previous == previous && row.hash == row.expected_hash(id);
        if !whole {
            return Chain::Broken { number };
        }
        previous = row.hash;
    }
    let length = rows.len() as u64;
    if length == count && previous == head {
        Chain::Whole
    } else {
        Chain::Broken { number: length + 1 }
    }
}

fn audit_row(row: &Row) -> Result<AuditRow, StoreError> {
    Ok(AuditRow {
        number: row.unsigned("number")?,
        at: row.time("at")?,
        actor: row.text("actor")?,
        action: row.text("action")?,
        subject: row.text("subject")?,
        before: row.text("before")?,
        after: row.text("after")?,
        previous: row.bytes("previous")?,
        hash: row.bytes("hash")?,
    })
}
