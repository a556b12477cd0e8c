"""Sandboxes: drivers, slots and the link to the agent server."""
