"""Text to batches: corpus readers, one tokenizer, token files, partitions, and the loader."""
