//! ● Where the archive is, as the configuration writes it. Pure: nothing is opened or looked up.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use super::name;

/// `s3://bucket/prefix` or `file:///directory`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreUrl {
    /// A bucket of S3, or of something that speaks its protocol.
    S3 {
        /// The bucket.
        bucket: String,
        /// What all keys begin with, without slashes at its ends; may be empty.
        prefix: String,
    },
    /// A directory of this machine: an absolute path.
    Directory(PathBuf),
}

/// What is wrong with a URL. It does not repeat the URL, into which people put passwords.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StoreUrlError(&'static str);

impl FromStr for StoreUrl {
    type Err = StoreUrlError;

    fn from_str(text: &str) -> Result<Self, StoreUrlError> {
        if let Some(rest) = text.strip_prefix("s3://") {
            s3(rest)
        } else if let Some(rest) = text.strip_prefix("file://") {
            directory(rest)
        } else {
            Err(StoreUrlError(
                "must be s3://bucket/prefix or file:///directory",
            ))
        }
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Self::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
            Self::Directory(path) => write!(f, "file://{}", path.display()),
        }
    }
}

fn s3(rest: &str) -> Result<StoreUrl, StoreUrlError> {
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    let allowed =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-".contains(&byte);
    let at_an_end = |byte: &u8| byte.is_ascii_alphanumeric();
    let bytes = bucket.as_bytes();
    if !(3..=63).contains(&bytes.len())
        || !bucket.bytes().all(allowed)
        || !bytes.first().is_some_and(at_an_end)
        || !bytes.last().is_some_and(at_an_end)
    {
        return Err(StoreUrlError(
            "the bucket must be 3 to 63 characters of a-z 0-9 . - (an access point is given by its alias)",
        ));
    }
    // Listings of directory buckets are not in order, and cannot begin behind a name.
    if bucket.ends_with("--x-s3") {
        return Err(StoreUrlError(
            "a directory bucket (S3 Express One Zone) cannot hold an archive",
        ));
    }
    if prefix.len() > name::LONGEST {
        return Err(StoreUrlError("the prefix must not exceed 512 bytes"));
    }
    if !prefix.is_empty()
        && prefix
            .split('/')
            .any(|part| name::check_component(part).is_err())
    {
        return Err(StoreUrlError(
            "the prefix must be of A-Z a-z 0-9 . _ / = - with something between slashes",
        ));
    }
    Ok(StoreUrl::S3 {
        bucket: bucket.to_owned(),
        prefix: prefix.to_owned(),
    })
}

fn directory(rest: &str) -> Result<StoreUrl, StoreUrlError> {
    // The path is taken as it is; someone who encodes it would get a directory of another name.
    if rest.contains(['%', '?', '#', '\0']) {
        return Err(StoreUrlError(
            "the path of a file:// URL is written as it is, without % ? #",
        ));
    }
    let path = Path::new(rest);
    if !path.is_absolute() {
        return Err(StoreUrlError(
            "a directory is given by three slashes and its absolute path: file:///directory",
        ));
    }
    let mut parts = path.components().skip(1).peekable();
    if parts.peek().is_none() {
        return Err(StoreUrlError("the root directory cannot hold an archive"));
    }
    if parts.any(|part| part == Component::ParentDir) {
        return Err(StoreUrlError("the path must not contain \"..\""));
    }
    // Without "." and repeated slashes.
    Ok(StoreUrl::Directory(path.components().collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<StoreUrl, StoreUrlError> {
        text.parse()
    }

    #[test]
    fn a_url_is_understood_and_shown_again() {
        for (text, shown) in [
            ("s3://bucket", "s3://bucket"),
            ("s3://bucket/", "s3://bucket"),
            ("s3://my.bucket-1/a/b=c/", "s3://my.bucket-1/a/b=c"),
            ("file:///var/lib/archive", "file:///var/lib/archive"),
            (
                "file:///var//lib/./my archive/",
                "file:///var/lib/my archive",
            ),
        ] {
            let url = parse(text).unwrap();
            assert_eq!(url.to_string(), shown);
            assert_eq!(parse(shown).unwrap(), url);
        }
        assert_eq!(
            parse("s3://bucket/a/b").unwrap(),
            StoreUrl::S3 {
                bucket: "bucket".to_owned(),
                prefix: "a/b".to_owned()
            }
        );
    }

    #[test]
    fn an_error_says_what_would_be_right() {
        for (text, expected) in [
            ("/var/lib", "file:///directory"),
            ("gs://bucket", "s3://bucket/prefix"),
            ("s3://", "3 to 63"),
            ("s3://Bucket", "3 to 63"),
            ("s3://-bucket", "3 to 63"),
            ("s3://key:secret@bucket/a", "3 to 63"),
            ("s3://arn:aws:s3:eu-west-1:1:accesspoint/x", "alias"),
            ("s3://bucket--use1-az4--x-s3", "directory bucket"),
            ("s3://bucket//a", "between slashes"),
            ("s3://bucket/a/../b", "between slashes"),
            ("s3://bucket/a b", "A-Z"),
            ("file://var/lib", "three slashes"),
            ("file://", "three slashes"),
            ("file:///", "root directory"),
            ("file:///a/../b", "\"..\""),
            ("file:///a%20b", "as it is"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
