//! Goal: how much a restore gains by reading segments ahead of their turn, from a store that answers after 100 ms.
//! Method: by hand. Objects under segments' names in moto, through a proxy that delays; read one after the other, and ahead.

use std::time::{Duration, Instant};

use bytes::Bytes;
use dr_agent::archive::log::{Ahead, Layout, Span, Way};
use dr_agent::cloud::store::{Encryption, Put, Store};
use dr_agent::names::history::History;
use dr_agent::names::stream::StreamName;
use dr_agent::pg::PgLsn;
use dr_agent_tests::moto::{self, Moto};
use dr_agent_tests::proxy::Proxy;

/// Of a quiet day.
const SEGMENTS: u64 = 360;

const HISTORY: History = History {
    system_identifier: 7,
    began: 5,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures, for a minute or two"]
async fn segments_are_read_ahead_of_their_turn() {
    let moto = Moto::start().await;
    moto.create_bucket("archive").await;
    let layout = Layout::new(&StreamName::new("dr_agent", "app"), HISTORY);
    let open = async |port| {
        let url = "s3://archive/prod".parse().unwrap();
        Store::open_with(&url, &Encryption::Default, &moto::settings(port))
            .await
            .unwrap()
    };
    let near = open(moto.port()).await;
    let spans: Vec<Span> = (1..=SEGMENTS)
        .map(|n| Span {
            start: PgLsn::from(n * 1000),
            end: PgLsn::from((n + 1) * 1000),
        })
        .collect();
    for span in &spans {
        let body = Bytes::from(vec![7; 1500]);
        let put = near.put_new(&layout.segment(*span), body).await.unwrap();
        assert_eq!(put, Put::Created);
    }
    let proxy = Proxy::start(moto.port()).await;
    proxy.delay(Duration::from_millis(50));
    let far = open(proxy.port()).await;

    let began = Instant::now();
    for span in &spans {
        far.get(&layout.segment(*span)).await.unwrap();
    }
    let one_by_one = began.elapsed();

    let mut way = Way::new(spans[0].start, spans.clone());
    let mut ahead = Ahead::new(&far, &layout, spans.iter().map(|span| (*span, 1500)));
    let began = Instant::now();
    while let Some(span) = way.pop() {
        ahead.open(span, &way).await.map(drop).unwrap();
    }
    let ahead = began.elapsed();
    eprintln!("{SEGMENTS} segments, 100 ms: one by one {one_by_one:?}, ahead {ahead:?}");
}
