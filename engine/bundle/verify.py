"""Is a bundle what it was when it was written? Every file's length, sha256 and numbers."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.bundle.manifest import Manifest, inside, library_versions, read_manifest
from engine.bundle.tensors import finite, load_tensors
from engine.config import Config
from engine.errors import PlexrankError
from engine.files import sha256
from engine.plugins import Plugins


@dataclass
class Verification:
    """What `plexrank bundle verify` prints. `problems` make a bundle unfit, `warnings` do not."""

    path: str
    name: str = ""
    version: str = ""
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify(path: Path, plugins: Plugins | None = None) -> Verification:
    """Checks everything and says all that is wrong, without raising.

    plugins: also builds the models on `meta` and checks every tensor's name, shape and dtype, and warns where a plugin
        or a library has another version than the one that trained.
    """
    from engine.bundle.open import Bundle

    start = time.perf_counter()
    result = Verification(str(path))
    try:
        manifest = read_manifest(Path(path))
        result.name, result.version = manifest.name, manifest.version
        result.files, result.bytes = len(manifest.files), sum(f.bytes for f in manifest.files.values())
        result.problems = broken_files(Path(path), manifest)
        if result.ok:
            bundle = Bundle.open(Path(path), verify=False)
            bundle.check_parts()
            if plugins is not None:
                bundle.model(plugins)
                bundle.encoder_model(plugins)
                result.warnings = _other_versions(manifest, plugins)
    except PlexrankError as error:
        result.problems.append(str(error))
    result.seconds = time.perf_counter() - start
    return result


def broken_files(bundle: Path, manifest: Manifest, *, contents: bool = True) -> list[str]:
    """What is wrong with the files, one sentence each; `contents` also reads them (sha256, finite numbers)."""
    wrong = []
    for found in sorted(bundle.rglob("*")):
        name = found.relative_to(bundle).as_posix()
        if name == "manifest.json" or (found.is_dir() and not found.is_symlink()):
            continue
        if name not in manifest.files:
            wrong.append(f"{bundle}: {name}: extra: the manifest does not name it; remove it")
    for name, entry in manifest.files.items():
        path = inside(bundle, name)
        if not path.is_file():
            wrong.append(f"{bundle}: {name}: missing; copy the bundle again")
            continue
        size = path.stat().st_size
        if size != entry.bytes:
            how = "truncated" if size < entry.bytes else "too long"
            wrong.append(f"{bundle}: {name}: {how}: {size:,} bytes, the manifest says {entry.bytes:,}")
        elif contents and sha256(path) != entry.sha256:
            wrong.append(f"{bundle}: {name}: edited or corrupted: its sha256 is not the manifest's; copy it again")
        elif contents and name.endswith(".safetensors"):
            bad = [tensor for tensor, value in load_tensors(path).items() if not finite(value)]
            if bad:
                wrong.append(f"{bundle}: {name}: not finite: {', '.join(bad[:5])}")
    return wrong


def schema_problem(config: Config, schema: dict[str, Any]) -> str | None:
    """What differs between a manifest's schema and the one that its configuration gives, or None."""
    own = config.schema_().model_dump(mode="json")
    if own == schema:
        return None
    names = [
        {f["name"]: f for f in s.get("features", ()) if isinstance(f, dict) and "name" in f} for s in (own, schema)
    ]
    odd = sorted(n for n in names[0].keys() | names[1].keys() if names[0].get(n) != names[1].get(n))
    return f"schema and configuration disagree{' on ' + ', '.join(odd[:5]) if odd else ''}"


def _other_versions(manifest: Manifest, plugins: Plugins) -> list[str]:
    warnings = []
    for p in manifest.plugins:
        distribution, installed = plugins.origin(p.kind, p.name)
        if (distribution, installed) != (p.distribution, p.version):
            warnings.append(
                f"{p.kind}.{p.name} comes from {distribution} {installed}, it was trained with "
                f"{p.distribution} {p.version}"
            )
    now = library_versions()
    for library, then in manifest.libraries.items():
        if now.get(library, "absent") != then:
            warnings.append(f"{library} is {now.get(library, 'absent')}, it was trained with {then}")
    return warnings
