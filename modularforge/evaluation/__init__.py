"""Losses per domain, routing statistics, generation, baselines and the report."""
