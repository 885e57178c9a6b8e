"""Reads what a run has written, on a folder or an object store, and shows it: figures and one page."""
