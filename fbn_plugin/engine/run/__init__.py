"""What every run has: its config, its checkpoints, logs and folder, its processes, and the command line."""
