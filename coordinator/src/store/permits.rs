//! The key that signs relay permits: one for all coordinators of a database.

use super::{StoreError, Timestamp, Tx};
use zeroize::Zeroizing;

impl Tx {
    /// The seed of the key that signs relay permits: `fresh` the first time, and the same ever
    /// after, whoever asks.
    ///
    /// # Errors
    /// The database's.
    pub async fn permit_seed(
        &mut self,
        fresh: &[u8; 32],
        now: Timestamp,
    ) -> Result<Zeroizing<[u8; 32]>, StoreError> {
        let sql = "INSERT INTO permit_signer (number, seed, created) VALUES (1, $1, $2) \
                   ON CONFLICT (number) DO NOTHING";
        self.execute(sql, &[fresh.into(), now.into()]).await?;
        let row = self.row("SELECT seed FROM permit_signer", &[]).await?;
        let row = row.ok_or(StoreError::Corrupt { column: "seed" })?;
        Ok(Zeroizing::new(row.bytes("seed")?))
    }
}
