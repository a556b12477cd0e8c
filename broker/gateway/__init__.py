"""The gateway process and what the broker says to it."""
