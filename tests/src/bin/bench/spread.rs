//! What several measurements come to.

use std::time::Duration;

use serde_json::{Value, json};

/// The middle of some measurements, and their least and greatest.
pub struct Spread {
    /// The middle one.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The greatest.
    pub most: f64,
}

impl Spread {
    /// Of these.
    pub fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let at = |place: usize| values.get(place).copied().unwrap_or(f64::NAN);
        Self {
            median: at(values.len() / 2),
            least: at(0),
            most: at(values.len().saturating_sub(1)),
        }
    }

    /// As it stands in documents.
    pub fn json(&self) -> Value {
        let Self {
            median,
            least,
            most,
        } = self;
        json!({ "median": median, "min": least, "max": most })
    }
}

/// Microseconds that this share of the packets took at most.
pub fn late(times: &mut [Duration], share: f64) -> f64 {
    times.sort_unstable();
    let place = (times.len() as f64 * share) as usize;
    times
        .get(place)
        .map_or(0.0, |time| time.as_secs_f64() * 1e6)
}
