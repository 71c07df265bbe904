"""What a run leaves behind: its folder, checkpoints, metrics, videos, and what it prints."""
