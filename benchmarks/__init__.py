"""Every claim of speed or quality has a command here: `python -m benchmarks.NAME [--quick] [--seeds N]`.

Each prints JSON lines on stdout, one a comparison, and tells its progress on stderr.
"""
