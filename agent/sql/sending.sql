-- Under route kinesis: which streams were sent from here, and since where. Without it a slot that somebody dropped would be
-- created anew, and what happened in between would be in no stream. Repeatable.
CREATE TABLE IF NOT EXISTS dr_agent.sending (
    stream            text PRIMARY KEY,
    system_identifier text NOT NULL,
    timeline          integer NOT NULL,
    -- NULL while the slot is being created: what is there of one then may not be gone on with.
    since             pg_lsn,
    -- The publication was altered, and whether decoding goes by it already is not known.
    listing           boolean NOT NULL DEFAULT false
);
