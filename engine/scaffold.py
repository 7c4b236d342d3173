"""`plexrank init DIR`: a project that works as it is, to change from there."""

from __future__ import annotations

import re
from importlib.resources import as_file, files
from pathlib import Path
from string import Template

from engine.errors import PlexrankError


def create_project(folder: Path) -> list[str]:
    """Writes a configuration, a plugin with its test, pyproject.toml and a README; the files written, sorted.

    The project takes the folder's name. PlexrankError if the folder holds anything, or its name cannot be one.
    """
    target = folder.resolve()
    name = re.sub(r"[^a-z0-9]+", "-", target.name.lower()).strip("-")
    if not name or not name[0].isalpha():
        raise PlexrankError(f"{folder}: a project's name starts with a letter; take another folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PlexrankError(f"{folder}: not an empty folder; `plexrank init` writes into a new one")
    names = {"name": name, "module": name.replace("-", "_") + "_plugin"}
    written = []
    with as_file(files("engine") / "templates" / "project") as template:
        for source in sorted(template.rglob("*.tmpl")):
            relative = source.relative_to(template).with_suffix("")
            if relative.name == "plugin.py":
                relative = relative.with_name(f"{names['module']}.py")
            destination = target / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            destination.write_text(Template(source.read_text("utf-8")).substitute(names), "utf-8")
            written.append(relative.as_posix())
    return sorted(written)
