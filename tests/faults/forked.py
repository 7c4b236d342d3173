"""A forked child that becomes `plexrank`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import engine.cli


def become(arguments: Sequence[str]) -> NoReturn:
    """Runs the command and ends the process with its status, whatever happens."""
    sys.argv = ["plexrank", *arguments]
    code = 1
    try:
        engine.cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
