//! What objects are, as the catalogs say it: whether both sides have the same, and what brings one to what the other has.
//!
//! ```text
//! dr_agent.shape (agent/sql/shape.sql, on both sides) ─▶ recorded on the source, found on the replica ─▶ compare ● ─▶ heal ● ─▶ statements
//! ```

mod acl;
mod compare;
pub mod computed;
mod heal;
mod object;
mod roles;
mod words;

pub use compare::differences;
pub use heal::{Healing, heal, is_certain_cast};
pub use object::read;
pub use roles::Roles;
