//! pgcopydb.

use anyhow::{Result, bail};

use super::{CopyGround, Ground, Outcome};
use crate::compare::arena::{Arena, Base};

/// Workloads whose backlog it drains.
pub(super) const FOLLOWS: &[&str] = &[];

pub(super) async fn prepare(_arena: &Arena, _fsync: bool) -> Result<Base> {
    bail!("not built yet")
}
pub(super) async fn drain(_ground: Ground<'_>, _base: &Base) -> Result<Outcome> {
    bail!("not built yet")
}
pub(super) async fn copy(_ground: CopyGround<'_>) -> Result<Outcome> {
    bail!("not built yet")
}
