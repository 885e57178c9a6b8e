"""Real models and real speech: a Whisper from a package of the registry, and what steering makes of it."""
