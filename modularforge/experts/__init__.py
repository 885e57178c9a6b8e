"""Kinds of expert: which parameters learn, and how experts become one model. `kind.py` says what a kind answers."""
