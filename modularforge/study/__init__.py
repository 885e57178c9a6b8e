"""Many variants of the method, trained and measured with shared work done once, in one table."""
