-- Calls whose tokens were estimated, since their provider said nothing.
ALTER TABLE usage_calls ADD COLUMN estimated INTEGER NOT NULL DEFAULT 0;
ALTER TABLE usage_hours ADD COLUMN estimated INTEGER NOT NULL DEFAULT 0;
