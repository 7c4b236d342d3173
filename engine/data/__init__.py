"""Data: read -> encode -> order -> history -> split -> batches, in memory that does not grow with the rows."""
