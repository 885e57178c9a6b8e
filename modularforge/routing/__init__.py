"""Which expert a token visits: what jobs count for that, and how routers are solved from the counts alone."""
