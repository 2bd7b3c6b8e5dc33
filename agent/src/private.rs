//! Directories for what holds rows: spill files, the spool, an archive in a directory. Only their owner may enter.
//!
//! # What it does not do
//! It changes no directory that is there: whoever made it has decided.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

/// Makes a directory and those above it that are missing, for the owner only, whatever the umask.
pub(crate) fn create_dir_all(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn only_the_owner_enters_what_is_made() {
        let home = tempfile::tempdir().unwrap();
        let there = home.path().join("there");
        fs::create_dir(&there).unwrap();
        fs::set_permissions(&there, fs::Permissions::from_mode(0o750)).unwrap();
        let below = there.join("a/b");
        create_dir_all(&below).unwrap();
        create_dir_all(&below).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let modes = [&there, &there.join("a"), &below].map(|path| mode(path));
        assert_eq!(modes, [0o750, 0o700, 0o700]);
    }
}
