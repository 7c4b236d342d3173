"""One training run of this engine in a process of its own, as the peers have: options in, one JSON object out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.lines import one_thread

one_thread()

from benchmarks.runs import run  # noqa: E402


def main() -> None:
    """Options: `config` (a path), `overrides`, `seed`."""
    asked = json.loads(sys.argv[-1])
    done = run(Path(asked["config"]), asked["overrides"], asked["seed"])
    kept = ("auc", "gauc", "logloss", "raw_logloss", "peak_rss_mb", "epochs", "embedding_bytes")
    figures = {name: done.figures.get(name) for name in kept}
    print(json.dumps({**figures, **done.speed}))


if __name__ == "__main__":
    main()
