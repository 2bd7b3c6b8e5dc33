//! AWS, and what stands in for it: S3 or a directory, Kinesis streams. It knows nothing of what is kept or sent there.

pub mod aws;
pub mod kinesis;
pub mod store;
#[cfg(test)]
mod tests;
