-- Rows are keyed by user, so that a user can move to another node; no path of this host is stored.

CREATE TABLE sessions (
    user        TEXT NOT NULL,
    workspace   TEXT NOT NULL,
    id          TEXT NOT NULL UNIQUE,
    agent       TEXT NOT NULL,
    state       TEXT NOT NULL,
    reason      TEXT NOT NULL DEFAULT '',
    slot        TEXT NOT NULL DEFAULT '',
    incarnation INTEGER NOT NULL DEFAULT 0,
    generation  INTEGER NOT NULL DEFAULT 0,
    config      BLOB,
    config_at   REAL NOT NULL DEFAULT 0,
    created_at  REAL NOT NULL,
    updated_at  REAL NOT NULL,
    PRIMARY KEY (user, workspace)
) STRICT;

CREATE TABLE sandboxes (
    slot        TEXT PRIMARY KEY,
    incarnation INTEGER NOT NULL,
    driver      TEXT NOT NULL,
    ref         TEXT NOT NULL,
    user        TEXT NOT NULL DEFAULT '',
    workspace   TEXT NOT NULL DEFAULT '',
    role        TEXT NOT NULL,
    welcomed    INTEGER NOT NULL DEFAULT 0,
    created_at  REAL NOT NULL
) STRICT;

CREATE TABLE sections (
    user        TEXT NOT NULL,
    section     TEXT NOT NULL,
    value       TEXT NOT NULL,
    version     INTEGER NOT NULL,
    updated_at  REAL NOT NULL,
    PRIMARY KEY (user, section)
) STRICT, WITHOUT ROWID;

CREATE TABLE tokens (
    hash        BLOB PRIMARY KEY,
    user        TEXT NOT NULL,
    workspace   TEXT NOT NULL,
    expires_at  REAL NOT NULL,
    revoked     INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE INDEX tokens_by_user ON tokens (user, workspace);
CREATE INDEX tokens_by_expiry ON tokens (expires_at);

CREATE TABLE hook_receipts (
    id          TEXT PRIMARY KEY,
    user        TEXT NOT NULL,
    workspace   TEXT NOT NULL,
    body_hash   BLOB NOT NULL,
    at          REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX hook_receipts_by_user ON hook_receipts (user);
CREATE INDEX hook_receipts_by_time ON hook_receipts (at);

CREATE TABLE packages (
    spec        TEXT PRIMARY KEY,
    key         TEXT NOT NULL,
    bins        TEXT NOT NULL,
    version     TEXT NOT NULL,
    created_at  REAL NOT NULL
) STRICT;
