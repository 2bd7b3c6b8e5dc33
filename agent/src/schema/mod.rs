//! The agent's own tables in the databases.

pub mod listed;
pub mod prepared;
pub mod refused;
