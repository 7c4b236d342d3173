"""The same computations in plain torch, written without the engine: what its overhead is measured against."""
