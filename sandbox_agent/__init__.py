"""The agent server: runs inside a sandbox, keeps one agent process and serves ACP to clients."""
