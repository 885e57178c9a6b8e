"""A short training of norm gains and router, kept only if held-out loss improves."""
