-- What users did, a row for each user, minute and kind: how often, and the seconds of the first and last.
CREATE TABLE activity (
    user   TEXT NOT NULL,
    minute INTEGER NOT NULL,
    kind   TEXT NOT NULL,
    count  INTEGER NOT NULL,
    first  INTEGER NOT NULL,
    last   INTEGER NOT NULL,
    PRIMARY KEY (user, minute, kind)
) STRICT, WITHOUT ROWID;

-- Made from it, a row for each hour and user, so that a look at everybody need not read every minute.
CREATE TABLE activity_hours (
    hour    INTEGER NOT NULL,
    user    TEXT NOT NULL,
    minutes INTEGER NOT NULL,
    uses    INTEGER NOT NULL,
    PRIMARY KEY (hour, user)
) STRICT, WITHOUT ROWID;
