"""Plugins of Acme for plexrank: the interest `recency` and the candidate source `editorial`."""
