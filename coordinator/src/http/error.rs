//! How a refusal looks from outside: a status for machines in between, a code for programs, a
//! sentence for people.

use crate::network::CommandError;
use crate::watch::FeedError;
use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use proto::control::{Refusal, RefusalCode};
use serde::de::DeserializeOwned;
use std::error::Error;

/// A [`Refusal`] on its way out.
#[derive(Debug)]
pub struct Refused(pub Refusal);

impl Refused {
    /// A refusal with this code and sentence.
    #[must_use]
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Self(Refusal {
            code,
            message: message.into(),
        })
    }

    /// The coordinator cannot answer now.
    #[must_use]
    pub fn unavailable() -> Self {
        Self::new(
            RefusalCode::Unavailable,
            "the coordinator cannot answer now; try again",
        )
    }
}

/// Reads a request.
///
/// # Errors
/// A refusal that says what cannot be read.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refused> {
    serde_json::from_slice(body).map_err(|error| {
        let message = format!("the request cannot be read: {error}");
        Refused::new(RefusalCode::BadRequest, message)
    })
}

impl From<CommandError> for Refused {
    fn from(error: CommandError) -> Self {
        let code = match &error {
            CommandError::Store(source) => {
                tracing::error!(error = chain(source), "the database failed");
                RefusalCode::Unavailable
            }
            CommandError::Token(_) => RefusalCode::Token,
            CommandError::NotANode => RefusalCode::UnknownNode,
            CommandError::KeyTaken => RefusalCode::KeyTaken,
            CommandError::Limit(_) => RefusalCode::Limit,
            CommandError::NoRelays => RefusalCode::NoRelays,
            CommandError::NoNetwork
            | CommandError::SeveralNetworks(_)
            | CommandError::Unknown { .. }
            | CommandError::Exists { .. }
            | CommandError::Name { .. }
            | CommandError::Addresses { .. }
            | CommandError::Policy(_)
            | CommandError::Validity
            | CommandError::NotOffered { .. }
            | CommandError::RouteTaken { .. }
            | CommandError::Offer(_) => RefusalCode::BadRequest,
        };
        Self::new(code, error.to_string())
    }
}

impl From<FeedError> for Refused {
    fn from(error: FeedError) -> Self {
        tracing::error!(error = chain(&error), "no netmap can be given");
        Self::unavailable()
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status = match self.0.code {
            RefusalCode::BadRequest | RefusalCode::Version => StatusCode::BAD_REQUEST,
            RefusalCode::Token | RefusalCode::Proof => StatusCode::FORBIDDEN,
            RefusalCode::UnknownNode => StatusCode::UNAUTHORIZED,
            RefusalCode::KeyTaken | RefusalCode::Limit | RefusalCode::NoRelays => {
                StatusCode::CONFLICT
            }
            RefusalCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        };
        (status, Json(self.0)).into_response()
    }
}

/// An error and what led to it, on one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
