"""The session: one durable object per user and workspace."""
