//! Goal: while the replica is away the change log goes on; were the site lost then, what committed more than an RPO ago is in the
//! archive.
//! Method: the replica is stopped under an agent that streams; what is written meanwhile has to reach the archive, and the replica
//! once it is back.

use dr_agent_tests::archive::{expect_state, protected, restore, wait_archived, work};
use dr_agent_tests::site::Site;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_goes_on_while_the_replica_is_away() {
    let site = Site::own().await;
    let (database, archive, agent, running) = protected(&site, "alone").await;
    let source = database.source().await;
    work(&source, 3, 0).await;
    // Each time one session's spool is the next one's.
    for round in 0..3 {
        site.replica.stop_immediately().await;
        let moments = work(&source, 12, 10 + round).await;
        let last = moments.last().unwrap();
        wait_archived(&database, &archive).await;
        // The lag is the replica's, whatever the archive has.
        let database_label = [("database", database.name.as_str())];
        running
            .wait_for_metric("dr_agent_rpo_breached", &database_label, |breached| {
                breached > 0.0
            })
            .await;
        site.replica.start_again().await;
        running.wait_for_streaming(&database.name).await;
        // Nothing was acknowledged for the replica.
        database.expect_equal().await;
        let name = format!("logged_alone_{round}");
        restore(&database, &agent, &name, &["--to-lsn", &last.lsn])
            .await
            .expect_code(0);
        expect_state(&database, &name, last).await;
    }
    running.stop().await;
}
