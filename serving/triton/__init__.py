"""A Triton Inference Server of our own: the binary that a PyPI wheel carries, launched, watched and ended."""
