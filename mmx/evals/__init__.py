"""Checkpoints judged: long-context tasks, and arms side by side."""
