//! Samples and what is said of them: median, 99th percentile, largest.
//!
//! Pure.

use serde_json::{Value, json};

/// Measured values of one quantity.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The smallest value that at least `percent` of the samples do not exceed (nearest rank); no
    /// interpolation, so it is a value that was really measured. `None` without samples.
    pub(crate) fn percentile(&self, percent: f64) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied()
    }

    pub(crate) fn max(&self) -> Option<f64> {
        self.percentile(100.0)
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "samples": self.len(),
            "min": self.percentile(0.0),
            "p50": self.percentile(50.0),
            "p99": self.percentile(99.0),
            "max": self.max(),
        })
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let samples: Samples = (1..=200).map(f64::from).collect();
        assert_eq!(samples.percentile(0.0), Some(1.0));
        assert_eq!(samples.percentile(50.0), Some(100.0));
        assert_eq!(samples.percentile(99.0), Some(198.0));
        assert_eq!(samples.max(), Some(200.0));
        assert_eq!(
            [3.0, 1.0].into_iter().collect::<Samples>().percentile(99.0),
            Some(3.0)
        );
        assert_eq!(Samples::default().percentile(50.0), None);
    }
}
