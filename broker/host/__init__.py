"""The host: tasks, signals, systemd, file watching, logs."""
