//! Several agents repair one damaged segment at once, and are killed in between: the segment's name is never without an object, and
//! what is whole stays.

use std::path::Path;

use bytes::Bytes;

use super::segment::{copy_aside, upload, verify, write};
use super::tests::{HISTORY, author, batch, lsn};
use super::*;
use crate::cloud::store::{Encryption, Put, Store, StoreUrl};
use crate::flow::changelog::Author;
use crate::names::stream::StreamName;

fn layout() -> Layout {
    Layout::new(&StreamName::new("dr_agent", "app"), HISTORY)
}

/// A complete segment in a spool of its own.
fn segment(spool: &Path) -> SpoolSegment {
    let limits = SpoolLimits {
        bytes: 1 << 20,
        segment_bytes: 1 << 10,
    };
    let mut spool = Spool::open(spool, limits, lsn(10)).unwrap().spool;
    let author = Author {
        stream: layout().stream().as_str().to_owned(),
        ..author()
    };
    spool.append(&author, &batch(10, 20, 600)).unwrap();
    spool.close().unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_that_repair_one_segment_never_leave_it_missing() {
    let home = tempfile::tempdir().unwrap();
    let (ours, theirs) = (
        segment(&home.path().join("ours")),
        segment(&home.path().join("theirs")),
    );
    let url = StoreUrl::Directory(home.path().join("store"));
    let store = Store::open(&url, &Encryption::Default).await.unwrap();
    let layout = layout();
    let (span, name) = (ours.span, layout.segment(ours.span));
    let is_whole = async || verify(&store, &layout, span).await.is_ok();
    let spoil = async || {
        store.delete(&name).await.unwrap();
        let put = store.put_new(&name, Bytes::from_static(b"<html>")).await;
        assert_eq!(put.unwrap(), Put::Created);
    };
    let kept = async || {
        let aside = format!("{}aside/", layout.root());
        store.list(&aside, None).await.unwrap().len()
    };

    // One has looked, and the other one does all of it; then the first one goes on, or is dead.
    spoil().await;
    let seen = copy_aside(&store, &layout, span).await.unwrap().unwrap();
    assert!(upload(&store, &layout, &theirs).await.unwrap().stored_bytes > 0);
    assert!(is_whole().await);
    let repaired = store.read(&name).await.unwrap().version();
    let second = write(&store, &layout, &ours, Some(seen)).await.unwrap();
    assert_eq!(second, None);
    assert_eq!(store.read(&name).await.unwrap().version(), repaired);
    assert!(is_whole().await);

    // Both have looked.
    spoil().await;
    let (mine, yours) = (
        copy_aside(&store, &layout, span).await.unwrap().unwrap(),
        copy_aside(&store, &layout, span).await.unwrap().unwrap(),
    );
    assert_eq!(mine, yours);
    // At every moment something is there.
    assert_eq!(store.get(&name).await.unwrap(), "<html>");
    assert!(
        write(&store, &layout, &ours, Some(mine))
            .await
            .unwrap()
            .is_some()
    );
    assert_eq!(
        write(&store, &layout, &theirs, Some(yours)).await.unwrap(),
        None
    );
    assert!(is_whole().await);
    assert_eq!(kept().await, 4);

    // What is whole is not put aside, and whoever comes later finds it.
    assert_eq!(copy_aside(&store, &layout, span).await.unwrap(), None);
    assert_eq!(
        upload(&store, &layout, &ours).await.unwrap().stored_bytes,
        0
    );
    assert_eq!(kept().await, 4);

    // Really at once.
    for _ in 0..10 {
        spoil().await;
        let looking = async {
            for _ in 0..50 {
                store.read(&name).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let (one, other, ()) = tokio::join!(
            upload(&store, &layout, &ours),
            upload(&store, &layout, &theirs),
            looking
        );
        one.unwrap();
        other.unwrap();
        assert!(is_whole().await);
    }
}
