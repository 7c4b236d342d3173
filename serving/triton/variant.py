"""How a version of a model scores: with tables of float32 or int8, by torch's operations or by compiled code."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.errors import BundleError, PlexrankError

if TYPE_CHECKING:
    from engine.bundle import Bundle
    from engine.components import Scorer
    from engine.config_triton import TritonConfig
    from engine.inference.live import LiveModel
    from engine.plugins import Plugins
    from serving.triton.selftest import SelfTest

log = logging.getLogger("plexrank.triton")

FILE, PACKAGE = "variant.json", "rank.pt2"
TOLERANCE, INT8_TOLERANCE = 1e-5, 0.01
"""Largest difference between a score and the in-process scorer's, where no other is wished."""


@dataclass(frozen=True)
class Variant:
    """Of a version's folder, in `variant.json`; a folder without the file is eager over float32.

    tolerance: as `TritonConfig` says it. sha256, made_for: of the compiled package beside it.
    """

    variant: Literal["eager", "aoti"] = "eager"
    tables: Literal["float32", "int8"] = "float32"
    tolerance: float = TOLERANCE
    sha256: str = ""
    made_for: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def wished(cls, settings: TritonConfig) -> Variant:
        usual = INT8_TOLERANCE if settings.tables == "int8" else TOLERANCE
        return cls(settings.variant, settings.tables, settings.tolerance or usual)

    @classmethod
    def read(cls, version: Path) -> Variant:
        """BundleError where the file cannot be read."""
        path = version / FILE
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError) as error:
            raise BundleError(f"{path}: cannot be read: {error}; export the model again") from None

    @property
    def plain(self) -> bool:
        """Whether it scores as the in-process scorer does."""
        return (self.variant, self.tables) == ("eager", "float32")

    def same(self, other: Variant) -> bool:
        """Whether a version of one could be taken for the other's."""
        mine, its = (replace(variant, sha256="", made_for={}) for variant in (self, other))
        return mine == its

    def open(self, version: Path, live: Path, bundle: Bundle, item_vectors_mb: int) -> LiveModel:
        """The live memory of a version's folder. PlexrankError as `LiveModel.open` and `Package.open`."""
        from engine.inference.live import LiveModel

        if self.variant == "eager":
            return LiveModel.open(live, bundle, item_vectors_mb=item_vectors_mb, tables=self.tables)
        from engine.inference.compiled import CompiledModel, Package

        package = Package.open(version / PACKAGE, self.sha256, self.made_for)
        return LiveModel.open(
            live,
            bundle,
            item_vectors_mb=item_vectors_mb,
            tables=self.tables,
            over=lambda model: CompiledModel(model, package),
        )


def build(wish: Variant, version: Path, bundle: Bundle, plugins: Plugins, threads: int) -> Variant:
    """Writes what a variant needs into the version's folder -> the variant with it. Nothing for the plain one.

    BundleError where a plugin cannot be compiled or there are no tables; PlexrankError without a compiler.
    """
    if wish.plain:
        return wish
    import torch

    from engine.files import sha256
    from engine.inference.live_making import check_quantisable

    model = bundle.model(plugins)
    if wish.tables == "int8":
        check_quantisable(bundle, model)
    built = wish
    if wish.variant == "aoti":
        from engine.inference.compiled import compile_rank, this_machine

        with torch.no_grad():
            compile_rank(model, version / PACKAGE, threads=threads)
        built = replace(wish, sha256=sha256(version / PACKAGE), made_for=this_machine())
    (version / FILE).write_text(json.dumps(asdict(built), indent=1) + "\n", "utf-8")
    return built


def check(
    variant: Variant, version: Path, live: Path, bundle: Bundle, scorer: Scorer, test: SelfTest, mb: int
) -> float:
    """Scores the self-test, and requests of all sizes alone and together -> the largest difference to the scorer's.

    live: a folder for it, removed at the end. BundleError where that is more than the variant's tolerance.
    """
    from engine.inference.runtime import Runtime
    from serving.triton.selftest_cases import of_all_sizes

    with _removed(live), closing(variant.open(version, live, bundle, mb)) as model:
        runtime = Runtime(lambda: model.now)
        asked = [*(dict(case.inputs) for case in test.cases), *of_all_sizes(bundle)]
        wanted = [scorer.infer(one) for one in asked]
        groups = [
            *([n] for n in range(len(asked))),
            *([*range(n, min(n + 8, len(asked)))] for n in range(0, len(asked), 8)),
        ]
        worst = max(
            difference
            for group in groups
            for answer, number in zip(runtime.score([asked[n] for n in group]), group, strict=True)
            for difference in _differences(answer, wanted[number], bundle.schema.tasks)
        )
    if not worst <= variant.tolerance:
        raise BundleError(
            f"{bundle.name} {bundle.version}: as {variant.variant} with {variant.tables} tables, scores differ by up "
            f"to {worst:.3g} from the in-process scorer's, which is more than {variant.tolerance:.3g}: export it as "
            "eager with float32 tables, or allow it (--tolerance)"
        )
    log.info("%s with %s tables: scores differ by up to %.3g", variant.variant, variant.tables, worst)
    return worst


@contextmanager
def _removed(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _differences(answer: Any, wanted: Mapping[str, Any], tasks: Sequence[str]) -> Iterator[float]:
    if isinstance(answer, PlexrankError):
        raise BundleError(f"a request of the self-test has no answer: {answer}") from answer
    for task in tasks:
        yield float(abs(answer[task] - wanted[task]).max(initial=0.0))
