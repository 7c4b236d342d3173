"""Delayed feedback: what is learnt of an impression before it is known what became of it."""
