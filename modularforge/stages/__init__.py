"""One short file per stage: read manifests, call the machinery, commit one manifest."""
