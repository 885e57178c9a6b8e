"""Tasks: what a model learns from, by what loss, and how well it does. `task.py` says what a task answers."""
