"""One training loop, its optimizer, its world and its signals."""
