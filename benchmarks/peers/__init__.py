"""The same rows trained by other libraries, each in its own process and environment (see `setup.py` here)."""
