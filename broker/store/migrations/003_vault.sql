-- Credentials of users, sealed; nothing beside the blob is secret.

CREATE TABLE vault (
    id          INTEGER PRIMARY KEY CHECK (id = 1),
    sequence    INTEGER NOT NULL,
    key_id      BLOB NOT NULL,
    canary      BLOB NOT NULL
) STRICT;

CREATE TABLE credentials (
    user        TEXT NOT NULL,
    provider    TEXT NOT NULL,
    version     INTEGER NOT NULL,
    kind        TEXT NOT NULL,
    mode        TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    key_id      BLOB NOT NULL,
    sealed      BLOB NOT NULL,
    expires_at  REAL NOT NULL DEFAULT 0,
    problem     TEXT NOT NULL DEFAULT '',
    failures    INTEGER NOT NULL DEFAULT 0,
    retry_at    REAL NOT NULL DEFAULT 0,
    created_at  REAL NOT NULL,
    updated_at  REAL NOT NULL,
    PRIMARY KEY (user, provider)
) STRICT;
CREATE INDEX credentials_by_key ON credentials (key_id, user, provider);
