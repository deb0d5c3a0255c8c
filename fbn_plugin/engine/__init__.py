"""Training and evaluation loops behind ``tools/``: configuration, data, checkpoints, logs, and one module a task."""
