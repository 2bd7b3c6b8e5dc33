//! ● What an object may be called. Pure.
//!
//! Narrow on purpose: such a name is the same in a key of S3, in a path and in an error, without any
//! escaping, and cannot leave the place it is relative to.

use super::StoreError;

/// What temporary files of a directory begin with; no object may.
pub(super) const TEMPORARY: &str = ".tmp-";

/// S3 allows keys of 1024 bytes, and the prefix of the store may take half of it.
pub(super) const LONGEST: usize = 512;

/// File systems allow 255 bytes between two slashes.
const LONGEST_COMPONENT: usize = 255;

/// Whether an object may have this name.
pub(super) fn check(name: &str) -> Result<(), StoreError> {
    let flaw = if name.len() > LONGEST {
        Err("it is longer than 512 bytes")
    } else {
        name.split('/').try_for_each(check_component)
    };
    flaw.map_err(|reason| refused(name, reason))
}

/// Whether objects may have names that begin with this.
pub(super) fn check_prefix(prefix: &str) -> Result<(), StoreError> {
    let (directories, rest) = prefix.rsplit_once('/').unwrap_or(("", prefix));
    check_characters(rest).map_err(|reason| refused(prefix, reason))?;
    if prefix.contains('/') {
        check(directories)?;
    }
    Ok(())
}

/// What is between two slashes; the error is the flaw.
pub(super) fn check_component(component: &str) -> Result<(), &'static str> {
    check_characters(component)?;
    match component {
        "" => Err("nothing is before, behind or between slashes"),
        "." | ".." => Err("\".\" and \"..\" are not names"),
        _ if component.len() > LONGEST_COMPONENT => Err("a part of it is longer than 255 bytes"),
        _ if component.starts_with(TEMPORARY) => Err("\".tmp-\" is kept for temporary files"),
        _ => Ok(()),
    }
}

fn check_characters(text: &str) -> Result<(), &'static str> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._=-".contains(&byte);
    if text.bytes().all(allowed) {
        Ok(())
    } else {
        Err("only A-Z a-z 0-9 . _ / = - are allowed")
    }
}

fn refused(name: &str, reason: &'static str) -> StoreError {
    StoreError::Name {
        name: name.to_owned(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_relative_and_need_no_escaping() {
        let longest = format!("{}/b", "a".repeat(255));
        for name in ["a", "base/0-16_B3/t=1.zst", "...", "a/.b", &longest] {
            check(name).unwrap();
        }
        let (long, too_long) = ("a".repeat(256), "a/".repeat(256) + "b");
        for name in [
            "", "/a", "a/", "a//b", ".", "a/../b", "..", "a b", "ä", "a\\b", "a\0", "~", ".tmp-1",
            "a/.tmp-", &long, &too_long,
        ] {
            check(name).unwrap_err();
        }
    }

    #[test]
    fn a_prefix_may_end_anywhere_in_a_name() {
        for prefix in ["", "a", "a/", "log/0000", "a/.", "..", ".tmp-"] {
            check_prefix(prefix).unwrap();
        }
        for prefix in ["/", "/a", "../", "a/../", "a//b", "a b", "%2e/"] {
            check_prefix(prefix).unwrap_err();
        }
    }
}
