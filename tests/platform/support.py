"""What the platform's tests share: entry points of a made-up distribution, and configurations in a file."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, PathDistribution, entry_points
from pathlib import Path
from textwrap import dedent

from engine.plugins import Plugins


def distribution(folder: Path, name: str, entries: dict[str, str], modules: dict[str, str]) -> list[EntryPoint]:
    """Writes modules and a dist-info into `folder`, as an installer would; its entry points of group `plexrank`."""
    info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    lines = "\n".join(f"{entry} = {module}" for entry, module in entries.items())
    (info / "entry_points.txt").write_text(f"[plexrank]\n{lines}\n")
    for module, code in modules.items():
        (folder / f"{module}.py").write_text(dedent(code))
        sys.modules.pop(module, None)
    return list(PathDistribution(info).entry_points.select(group="plexrank"))


def with_builtins(points: list[EntryPoint]) -> Plugins:
    """The installed plugins and some more."""
    return Plugins([*entry_points(group="plexrank"), *points])


MINIMAL = """\
name: ads
data:
  source: {interactions: clicks.csv}
  labels: {click: {column: clicked}}
features:
  - {name: user_id, side: user}
  - {name: item_id}
  - {name: history, kind: sequence, of: item_id}
interest: {name: mean}
"""


def write(folder: Path, text: str, name: str = "ads.yaml") -> Path:
    path = folder / name
    path.write_text(dedent(text))
    return path
