//! The archive: the change log (`log`) and base backups (`base`), from which any moment is restored.

pub mod base;
pub mod log;
