"""Other people's models: where they come from, whether they are whole, what they are called in a fingerprint."""
