"""Tables of the control database."""

from __future__ import annotations

from cumbre.stores.migrations import migrate
from cumbre.stores.postgres import Database

STEPS = (
    """
    CREATE SCHEMA IF NOT EXISTS control;
    CREATE TABLE control.lease (
        identity text PRIMARY KEY,
        holder text NOT NULL,
        epoch bigint NOT NULL,
        renewal bigint NOT NULL,
        renewed_tai float8 NOT NULL,
        boot text NOT NULL DEFAULT ''
    );
    CREATE TABLE control.entity (
        name text PRIMARY KEY,
        protocol text NOT NULL,
        configuration text NOT NULL,
        processing text NOT NULL,
        configuring text NOT NULL DEFAULT '',
        error_code int NOT NULL DEFAULT 0,
        error_report text NOT NULL DEFAULT '',
        version text NOT NULL DEFAULT '',
        hash text NOT NULL DEFAULT '',
        settings text NOT NULL DEFAULT '{}',
        enabled_tai float8 NOT NULL DEFAULT 0,
        epoch bigint NOT NULL DEFAULT 0,
        changed_tai float8 NOT NULL
    );
    CREATE TABLE control.command (
        topic text NOT NULL,
        commander text NOT NULL,
        origin int NOT NULL,
        seq_num int NOT NULL,
        sent_tai float8 NOT NULL,
        argument text NOT NULL,
        accepted_tai float8 NOT NULL,
        ended_tai float8,
        ack int NOT NULL,
        result text NOT NULL,
        epoch bigint NOT NULL DEFAULT 0,
        PRIMARY KEY (topic, commander, origin, seq_num, sent_tai)
    );
    CREATE INDEX command_open ON control.command (topic) WHERE ended_tai IS NULL;
    CREATE TABLE control.job (
        job_id text PRIMARY KEY,
        entity text NOT NULL,
        kind text NOT NULL,
        obs_id text NOT NULL,
        group_id text NOT NULL,
        instrument text NOT NULL,
        part text NOT NULL,
        detectors text[] NOT NULL,
        link text NOT NULL,
        pair int,
        mode text NOT NULL,
        state text NOT NULL,
        attempt int NOT NULL,
        epoch bigint NOT NULL,
        submitted_tai float8 NOT NULL,
        started_tai float8,
        ended_tai float8,
        deadline_tai float8 NOT NULL,
        outcome text NOT NULL DEFAULT '',
        message text NOT NULL DEFAULT '',
        bytes bigint NOT NULL DEFAULT 0,
        duration_s float8
    );
    CREATE INDEX job_open ON control.job (entity) WHERE ended_tai IS NULL;
    CREATE INDEX job_obs ON control.job (obs_id);
    CREATE TABLE control.replicator (
        name text PRIMARY KEY,
        link text NOT NULL,
        pair int NOT NULL,
        pool text NOT NULL,
        reason text NOT NULL,
        heartbeat_tai float8 NOT NULL
    );
    CREATE TABLE control.lockout (
        only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
        locked boolean NOT NULL,
        identity text NOT NULL,
        reason text NOT NULL,
        since_tai float8 NOT NULL
    );
    CREATE TABLE control.software (
        version text NOT NULL,
        hash text NOT NULL,
        accepted_by text NOT NULL,
        accepted_tai float8 NOT NULL,
        PRIMARY KEY (version, hash)
    );
    CREATE TABLE control.installation (
        machine text PRIMARY KEY,
        version text NOT NULL,
        hash text NOT NULL,
        checked_tai float8 NOT NULL
    );
    """,
)


def prepare(database: Database) -> None:
    """Bring the control tables to this program's version."""
    migrate(database, "control", STEPS)
