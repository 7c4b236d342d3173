"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "info", "warn", "wrong"]


@dataclass(frozen=True)
class Finding:
    """`wrong`: plexrank cannot work; `warn`: it works, less well; `remedy`: the command to type, or nothing."""

    name: str
    status: Status
    detail: str
    remedy: str = ""
