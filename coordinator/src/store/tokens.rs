//! Join tokens. Only the hash of a secret is kept: who reads the database cannot join.

use super::{Row, StoreError, Timestamp, Tx, json};
use proto::control::TokenSecret;
use proto::id::NetworkId;
use proto::netmap::Owner;
use sha2::{Digest, Sha256};

/// SHA-256 of a token's secret. The secret has 160 random bits, so a plain hash is enough.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    /// The hash of this secret.
    #[must_use]
    pub fn of(secret: &TokenSecret) -> Self {
        Self(Sha256::digest(secret.expose()).into())
    }
}

/// A token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRow {
    /// The network that it admits to.
    pub network: NetworkId,
    /// Whose the nodes will be.
    pub owner: Owner,
    /// Whether it admits more than one node.
    pub reusable: bool,
    /// Whether its nodes are removed some time after they go offline.
    pub ephemeral: bool,
    /// When it was made.
    pub created: Timestamp,
    /// From when on it admits nobody.
    pub expires: Timestamp,
}

/// What a token is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenState {
    /// It admits.
    Good(TokenRow),
    /// It admitted the one node that it was for.
    Used,
    /// Its time is over.
    Expired,
    /// There is no such token.
    Unknown,
}

fn token(row: &Row) -> Result<TokenRow, StoreError> {
    Ok(TokenRow {
        network: NetworkId(row.unsigned("network")?),
        owner: row.json("owner")?,
        reusable: row.flag("reusable")?,
        ephemeral: row.flag("ephemeral")?,
        created: row.time("created")?,
        expires: row.time("expires")?,
    })
}

impl Tx {
    /// Adds a token.
    ///
    /// # Errors
    /// The database's.
    pub async fn insert_token(
        &mut self,
        hash: TokenHash,
        token: &TokenRow,
    ) -> Result<(), StoreError> {
        self.execute(
            "INSERT INTO tokens (hash, network, owner, reusable, ephemeral, created, expires, \
             uses) VALUES ($1, $2, $3, $4, $5, $6, $7, 0)",
            &[
                (&hash.0).into(),
                token.network.into(),
                json(&token.owner),
                token.reusable.into(),
                token.ephemeral.into(),
                token.created.into(),
                token.expires.into(),
            ],
        )
        .await?;
        Ok(())
    }

    /// What the token is good for now. Only [`Tx::claim_token`] decides.
    ///
    /// # Errors
    /// The database's.
    pub async fn token(
        &mut self,
        hash: TokenHash,
        now: Timestamp,
    ) -> Result<TokenState, StoreError> {
        let sql = "SELECT network, owner, reusable, ephemeral, created, expires, uses \
                   FROM tokens WHERE hash = $1";
        let Some(row) = self.row(sql, &[(&hash.0).into()]).await? else {
            return Ok(TokenState::Unknown);
        };
        let (token, uses) = (token(&row)?, row.int("uses")?);
        Ok(if token.expires <= now {
            TokenState::Expired
        } else if uses > 0 && !token.reusable {
            TokenState::Used
        } else {
            TokenState::Good(token)
        })
    }

    /// Uses the token, if it is good: one statement, so that of any number of simultaneous claims
    /// of a single-use token exactly one wins.
    ///
    /// # Errors
    /// The database's.
    pub async fn claim_token(
        &mut self,
        hash: TokenHash,
        now: Timestamp,
    ) -> Result<Option<TokenRow>, StoreError> {
        let sql = "UPDATE tokens SET uses = uses + 1 \
                   WHERE hash = $1 AND expires > $2 AND (reusable = 1 OR uses = 0) \
                   RETURNING network, owner, reusable, ephemeral, created, expires";
        self.row(sql, &[(&hash.0).into(), now.into()])
            .await?
            .as_ref()
            .map(token)
            .transpose()
    }
}
