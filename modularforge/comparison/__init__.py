"""Runs side by side: statistics of their curves, where they part, and what looks wrong in them."""
