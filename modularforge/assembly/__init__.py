"""Merge backbone and experts by a plan of byte ranges, and solve the router from statistics."""
