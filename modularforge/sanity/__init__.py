"""Checks that take seconds and save GPU hours: the node, the model, the data, a short training."""
