"""Scoring requests that come as tensors: what a model takes and gives, how a request is told, and what answers it."""
