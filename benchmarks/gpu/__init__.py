"""What needs a GPU to be proven, in slices of under nine minutes; `docs/gpu.md` says how it is run and what was."""
