//! What objects are, as the catalogs say it, and whether both sides mean the same.

pub mod computed;
