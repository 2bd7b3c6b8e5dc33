use std::fs::{self, File};
use std::future::{Future as _, poll_fn};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;

use super::*;
use crate::error::{Class, Classify as _};
use crate::time::wall_clock;

async fn open(path: &Path) -> Store {
    let url = StoreUrl::Directory(path.to_owned());
    Store::open(&url, &Encryption::Default).await.unwrap()
}

async fn put(store: &Store, name: &str) -> Put {
    let body = Bytes::from(name.to_owned());
    store.put_new(name, body).await.unwrap()
}

async fn names(store: &Store, prefix: &str, after: Option<&str>) -> Vec<String> {
    let listed = store.list(prefix, after).await.unwrap();
    listed.into_iter().map(|listed| listed.name).collect()
}

/// What is at the root and is no object.
fn temporary(root: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(root).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.starts_with(name::TEMPORARY)
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_writers_one_creates_and_the_others_change_nothing() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).await;
    for round in 0..20 {
        let name = format!("log/{round}");
        let mut tasks = tokio::task::JoinSet::new();
        for writer in 0..16_u8 {
            let (store, name) = (store.clone(), name.clone());
            tasks.spawn(async move {
                let body = Bytes::from(vec![writer; 1000]);
                if writer % 2 == 0 {
                    return (writer, store.put_new(&name, body).await.unwrap());
                }
                let mut object = store.create(&name).await.unwrap();
                object.write(body).await.unwrap();
                (writer, object.finish().await.unwrap().0)
            });
        }
        let ends = tasks.join_all().await;
        let winners: Vec<u8> = ends
            .iter()
            .filter(|(_, put)| *put == Put::Created)
            .map(|(writer, _)| *writer)
            .collect();
        assert_eq!(winners.len(), 1, "{ends:?}");
        assert_eq!(store.get(&name).await.unwrap(), vec![winners[0]; 1000]);
    }
    assert_eq!(temporary(home.path()), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn an_unfinished_object_is_nowhere_and_its_file_goes_when_it_is_old() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).await;
    let mut given_up = store.create("base/1/a").await.unwrap();
    given_up.write(Bytes::from_static(b"part")).await.unwrap();
    assert_eq!(temporary(home.path()).len(), 1);
    drop(given_up);
    assert_eq!(temporary(home.path()).len(), 0);

    // As SIGKILL leaves it: no destructor runs.
    let mut killed = store.create("base/1/a").await.unwrap();
    killed.write(Bytes::from_static(b"part")).await.unwrap();
    std::mem::forget(killed);
    let left = temporary(home.path());
    assert_eq!(left.len(), 1);
    assert_eq!(names(&store, "", None).await, Vec::<String>::new());
    let error = store.get("base/1/a").await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
    assert_eq!(put(&store, "base/1/a").await, Put::Created);

    // It might be another agent's that is at work.
    open(home.path()).await;
    assert_eq!(temporary(home.path()), left);
    let two_days_ago = wall_clock() - Duration::from_secs(48 * 3600);
    let file = File::options().write(true).open(&left[0]).unwrap();
    file.set_modified(two_days_ago).unwrap();
    let store = open(home.path()).await;
    assert_eq!(temporary(home.path()), Vec::<PathBuf>::new());
    assert_eq!(names(&store, "", None).await, ["base/1/a"]);
}

#[tokio::test]
async fn a_listing_is_in_order_of_whole_names_and_holds_objects_only() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).await;
    let all = ["a", "b-2/x", "b/1/x", "b/1/y", "b/10", "b/2", "b0", "c.d/e"];
    for name in all.iter().rev() {
        assert_eq!(put(&store, name).await, Put::Created);
    }
    fs::write(home.path().join("b/not an object"), "").unwrap();
    fs::write(home.path().join(".tmp-x"), "").unwrap();
    fs::create_dir(home.path().join("empty")).unwrap();
    assert_eq!(names(&store, "", None).await, all);
    assert_eq!(names(&store, "b", None).await, all[1..7]);
    assert_eq!(names(&store, "b/", None).await, all[2..6]);
    assert_eq!(names(&store, "b/1", None).await, all[2..5]);
    assert_eq!(names(&store, "b/1/", Some("b/1/x")).await, ["b/1/y"]);
    assert_eq!(names(&store, "", Some("b/1/zzz")).await, all[4..]);
    assert_eq!(
        names(&store, "nothing/here", None).await,
        Vec::<String>::new()
    );
    let listed = store.list("c", None).await.unwrap();
    assert_eq!(listed[0].bytes, 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn deleting_takes_empty_directories_along_and_gets_in_nobodys_way() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).await;
    store.delete("not/there").await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..4 {
        let store = store.clone();
        tasks.spawn(async move {
            for _ in 0..100 {
                let name = format!("base/1/{writer}");
                assert_eq!(put(&store, &name).await, Put::Created);
                store.delete(&name).await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn names_are_checked_before_anything_is_touched() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("outside"), "kept").unwrap();
    let store = open(&home.path().join("store")).await;
    let name = "../outside";
    let errors = [
        store.put_new(name, Bytes::new()).await.unwrap_err(),
        store.create(name).await.map(drop).unwrap_err(),
        store.get(name).await.unwrap_err(),
        store.read(name).await.map(drop).unwrap_err(),
        store.list(name, None).await.unwrap_err(),
        store.delete(name).await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, StoreError::Name { .. }), "{error}");
        assert_eq!(error.class(), Class::Definite);
    }
    assert_eq!(fs::read(home.path().join("outside")).unwrap(), b"kept");
}

#[tokio::test]
async fn a_store_that_is_gone_is_not_empty() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("deep/below");
    let store = open(&root).await;
    assert_eq!(names(&store, "", None).await, Vec::<String>::new());
    fs::remove_dir(&root).unwrap();
    // Gone, and then with something else in its place.
    for _ in 0..2 {
        let errors = [
            store.list("base/", None).await.unwrap_err(),
            store.get("a").await.unwrap_err(),
            store.put_new("a", Bytes::new()).await.unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(error, StoreError::Io { .. }), "{error}");
        }
        fs::write(&root, "").unwrap();
    }
}

#[tokio::test]
async fn who_only_looks_makes_nothing_and_tidies_nothing_up() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("store");
    let url = StoreUrl::Directory(root.clone());
    let store = Store::as_it_is(&url, &Encryption::Default).await.unwrap();
    let error = store.list("", None).await.unwrap_err();
    assert!(matches!(error, StoreError::Io { .. }), "{error}");
    assert!(!root.exists());
    assert_eq!(put(&open(&root).await, "a").await, Put::Created);
    let left = root.join(format!("{}left", name::TEMPORARY));
    let file = File::create(&left).unwrap();
    file.set_modified(wall_clock() - Duration::from_secs(48 * 3600))
        .unwrap();
    let store = Store::as_it_is(&url, &Encryption::Default).await.unwrap();
    assert_eq!(names(&store, "", None).await, ["a"]);
    assert!(left.exists());
}

#[tokio::test]
async fn files_are_for_their_owner_only() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("store");
    let store = open(&root).await;
    assert_eq!(put(&store, "base/a").await, Put::Created);
    for (path, mode) in [("", 0o700), ("base", 0o700), ("base/a", 0o600)] {
        let status = fs::metadata(root.join(path)).unwrap();
        assert_eq!(status.permissions().mode() & 0o777, mode, "{path}");
    }
}

#[tokio::test]
async fn an_object_and_a_directory_do_not_pass_for_each_other() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).await;
    assert_eq!(put(&store, "a/b").await, Put::Created);
    for name in ["a/b/c", "a"] {
        let error = store.put_new(name, Bytes::new()).await.unwrap_err();
        assert_eq!(error.class(), Class::Definite, "{error:?}");
        let error = store.get(name).await.unwrap_err();
        assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
        store.delete(name).await.unwrap();
    }
    assert_eq!(names(&store, "", None).await, ["a/b"]);
}

#[tokio::test]
async fn a_write_that_was_not_awaited_spoils_its_object() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).await;
    let mut object = store.create("a").await.unwrap();
    let large = Bytes::from(vec![1; 16 << 20]);
    {
        // Begun, and given up at once: how long it would have taken does not matter.
        let mut write = Box::pin(object.write(large));
        let is_done = poll_fn(|context| Poll::Ready(write.as_mut().poll(context).is_ready())).await;
        assert!(!is_done, "16 MiB were written in no time");
    }
    let error = object.write(Bytes::new()).await.unwrap_err();
    assert!(matches!(error, StoreError::Torn { .. }), "{error}");
    let error = object.finish().await.unwrap_err();
    assert!(matches!(error, StoreError::Torn { .. }), "{error}");
    assert_eq!(names(&store, "", None).await, Vec::<String>::new());
}
