-- Calls to models, by the ids that the gateway gave them: one that is told twice counts once. Kept for some days.
CREATE TABLE usage_calls (
    id          TEXT NOT NULL PRIMARY KEY,
    at          REAL NOT NULL,
    user        TEXT NOT NULL,
    team        TEXT NOT NULL,
    workspace   TEXT NOT NULL,
    agent       TEXT NOT NULL,
    provider    TEXT NOT NULL,
    model       TEXT NOT NULL,
    endpoint    TEXT NOT NULL,
    status      INTEGER NOT NULL,
    outcome     TEXT NOT NULL,
    cached      TEXT NOT NULL,
    input       INTEGER,
    output      INTEGER,
    cache_read  INTEGER,
    cache_write INTEGER,
    reasoning   INTEGER,
    cost_usd    REAL NOT NULL,
    duration_s  REAL NOT NULL,
    queue_s     REAL NOT NULL,
    ttft_s      REAL
) STRICT, WITHOUT ROWID;

CREATE INDEX usage_calls_at ON usage_calls (at);
CREATE INDEX usage_calls_user ON usage_calls (user);

-- Made from them as they come, a row for each hour, user, team, provider and model.
CREATE TABLE usage_hours (
    hour        INTEGER NOT NULL,
    user        TEXT NOT NULL,
    team        TEXT NOT NULL,
    provider    TEXT NOT NULL,
    model       TEXT NOT NULL,
    calls       INTEGER NOT NULL,
    errors      INTEGER NOT NULL,
    cached      INTEGER NOT NULL,
    input       INTEGER NOT NULL,
    output      INTEGER NOT NULL,
    cache_read  INTEGER NOT NULL,
    cache_write INTEGER NOT NULL,
    reasoning   INTEGER NOT NULL,
    cost_usd    REAL NOT NULL,
    duration_s  REAL NOT NULL,
    ttft_s      REAL NOT NULL,
    ttft_calls  INTEGER NOT NULL,
    PRIMARY KEY (hour, user, team, provider, model)
) STRICT, WITHOUT ROWID;

CREATE INDEX usage_hours_user ON usage_hours (user);

-- How soon models begin to answer, smoothed.
CREATE TABLE model_speed (
    provider TEXT NOT NULL,
    model    TEXT NOT NULL,
    ttft_s   REAL,
    count    INTEGER NOT NULL,
    at       REAL NOT NULL,
    PRIMARY KEY (provider, model)
) STRICT, WITHOUT ROWID;
