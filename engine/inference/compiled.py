"""What lies behind the tables, interest and ranker, as machine code: torch.export and AOTInductor.

The code is made for a kind of processor and a version of torch. Weights are no part of it: each call hands them over,
so one package scores for every dense part of a model, and a new one takes effect with the model that it comes in.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torchrec.sparse.jagged_tensor import JaggedTensor

from engine.components import Inputs, InterestModel, Ranker
from engine.errors import BundleError, PlexrankError
from engine.files import sha256
from engine.model import INTEREST, RankingModel

_EXAMPLE = 3, 7, 11
"""Requests, candidates and history items of the call that is traced: different, and none of them 0 or 1."""
_SETS = (
    "avx",
    "sse",
    "fma",
    "bmi",
    "f16c",
    "abm",
    "movbe",
    "adx",
    "sha",
    "aes",
    "vaes",
    "gfni",
    "pclmul",
    "vpclmul",
    "amx",
)
"""Of a processor's flags, what code for it may be made of."""


class CompiledModel(RankingModel):
    """A frozen ranking model of another's parts, whose `rank` runs the package in their place."""

    def __init__(self, model: RankingModel, package: Package) -> None:
        super().__init__(model.schema, model.embedding, model.interest, model.ranker)
        self.eval()
        self._run = package.run
        self._columns = [f.name for f in self.fields]
        self._weights = list(_weights(model).values())

    def rank(
        self,
        pooled: Mapping[str, Tensor],
        dense: Tensor,
        attended: tuple[Tensor, JaggedTensor] | None,
        user_of_target: Tensor,
    ) -> dict[str, Tensor]:
        columns = torch.cat([*(pooled[name] for name in self._columns), dense], dim=1)
        if not len(columns):
            return super().rank(pooled, dense, attended, user_of_target)
        given = [columns]
        if attended is not None:
            history = attended[1]
            given += [history.values().contiguous(), history.lengths().long(), user_of_target.contiguous()]
        return dict(zip(self.ranker.tasks, self._run([*given, *self._weights]), strict=True))


class Package:
    """Machine code of a model's `rank`, loaded."""

    def __init__(self, path: Path) -> None:
        """PlexrankError where torch cannot load it."""
        try:
            loaded = torch._inductor.aoti_load_package(str(path))
        except Exception as error:
            raise PlexrankError(f"{path}: cannot be loaded: {_first_line(error)}; export the model again") from error
        self.run: Callable[[list[Tensor]], list[Tensor]] = loaded.loader.run
        """Contiguous tensors: as `_Behind.forward` takes them."""

    @classmethod
    def open(cls, path: Path, checksum: str, made_for: Mapping[str, Any]) -> Package:
        """checksum: sha256 that it must have, before anything of it runs; made_for: what `this_machine` was.

        PlexrankError where the file is another, or was made for another processor or another torch.
        """
        try:
            found = sha256(path)
        except OSError as error:
            raise PlexrankError(f"{path}: {error.strerror or error}; export the model again") from None
        if found != checksum:
            raise PlexrankError(f"{path}: edited or corrupted: its sha256 is not that of the export; export again")
        here = this_machine()
        missing = sorted(set(made_for["flags"]) - set(here["flags"]))
        other = [
            f"{what} {made_for[what]}, here is {here[what]}"
            for what in ("torch", "machine")
            if made_for[what] != here[what]
        ]
        if missing:
            other.append(f"a processor with {', '.join(missing[:5])}")
        if other:
            raise PlexrankError(f"{path}: made for {'; '.join(other)}: export it on a machine like this, or as eager")
        return cls(path)


def this_machine() -> dict[str, Any]:
    """What code that is made here runs on."""
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, words = line.partition(":")
            if name.strip() in ("flags", "Features"):
                flags = {word for word in words.split() if word.startswith(_SETS)}
                break
    except OSError:
        pass
    return {"torch": torch.__version__, "machine": platform.machine(), "flags": sorted(flags)}


def check_compiler() -> None:
    """PlexrankError where there is no C++ compiler."""
    wanted = os.environ.get("CXX") or "g++"
    if shutil.which(wanted) is None:
        raise PlexrankError(
            f"serving.triton.variant: aoti needs a C++ compiler, and there is no {wanted}: apt-get install g++ "
            "(or set the environment's CXX to one), or export as eager"
        )


def compile_rank(model: RankingModel, path: Path, *, threads: int = 1) -> None:
    """Writes the package of a frozen model: for any number of requests, candidates and history items.

    BundleError naming the plugin that torch.export cannot follow, with what torch says; PlexrankError without a
    compiler. Takes half a minute.
    """
    check_compiler()
    program = exported(model)
    options = {"cpp.threads": threads, "pattern_matcher": False}
    try:
        with _quiet(), _own_cache(path.parent):
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    except Exception as error:
        raise BundleError(
            f"{_parts(model)} cannot be compiled: {_first_line(error)}; export the model as eager"
        ) from error


def exported(model: RankingModel) -> ExportedProgram:
    """The graph. BundleError naming the plugin that torch.export cannot follow."""
    try:
        return _exported(model, _Behind(model))
    except Exception as error:
        reason = _first_line(error)
        for what, part in _alone(model):
            try:
                _exported(model, part)
            except Exception as its:
                raise BundleError(f"{what} cannot be compiled: {_first_line(its)}; export the model as eager") from its
        raise BundleError(f"{_parts(model)} cannot be compiled: {reason}; export the model as eager") from error


class _Behind(nn.Module):
    """What is traced. interest, ranker: replaced by nothing where the other is looked at alone."""

    def __init__(self, model: RankingModel, *, interest: bool = True, ranker: bool = True) -> None:
        super().__init__()
        self.interest = model.interest if interest else None
        self.ranker = model.ranker
        self._ranks = ranker
        self._sequences = [s.of for s in model.sequences]
        self._widths = {n: w for n, w in model.ranker.inputs.fields.items() if n != INTEREST}
        self._dense = model.ranker.inputs.dense
        self._attends = model.ranker.inputs.fields.get(INTEREST, 0)

    def forward(self, columns: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """columns float32 [N, fields' widths + dense], with an interest model history float32 [T, D], lengths int64
        [U], user_of_target int64 [N], then the weights -> logits [N], one a task."""
        *split, dense = columns.split([*self._widths.values(), self._dense], dim=1)
        fields = dict(zip(self._widths, split, strict=True))
        if self._attends:
            history, lengths, user_of_target = more[:3]
            targets = [fields[name] for name in self._sequences]
            if self.interest is None:
                fields[INTEREST] = columns.new_zeros(columns.shape[0], self._attends)
            else:
                offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
                jagged = JaggedTensor(values=history, lengths=lengths, offsets=offsets)
                fields[INTEREST] = self.interest(torch.cat(targets, dim=1), jagged, user_of_target)
        if not self._ranks:
            return (fields[INTEREST],)
        return tuple(self.ranker(Inputs(fields, dense)).values())


class _WithWeights(nn.Module):
    """The same, its weights being arguments."""

    def __init__(self, behind: _Behind, names: list[str]) -> None:
        super().__init__()
        self._behind = [behind]  # no submodule: its weights are none of this module's
        self._names = names

    def forward(self, given: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
        state = dict(zip(self._names, weights, strict=True))
        found: tuple[Tensor, ...] = torch.func.functional_call(self._behind[0], state, tuple(given), strict=False)
        return found


def _weights(model: RankingModel) -> dict[str, Tensor]:
    """name -> weight of interest and ranker, contiguous, in a fixed order."""
    state = model.state_dict()
    return {n: state[n].contiguous() for n in sorted(state) if n.startswith(("interest.", "ranker."))}


def _exported(model: RankingModel, behind: _Behind) -> ExportedProgram:
    users, n, t = _EXAMPLE
    weights = _weights(model)
    device = torch.device("cpu")
    width = sum(behind._widths.values()) + behind._dense
    sizes = Dim("candidates", min=1), Dim("history", min=0), Dim("requests", min=1)
    given, dims = [torch.rand(n, width, device=device)], [{0: sizes[0]}]
    if behind._attends:
        assert model.interest is not None
        lengths = torch.tensor([t - users + 1] + [1] * (users - 1))
        given += [torch.rand(t, model.interest.dim), lengths, torch.arange(n) % users]
        dims += [{0: sizes[1]}, {0: sizes[2]}, {0: sizes[0]}]
    args = given, [w.clone() for w in weights.values()]
    shapes: Any = dims, [None] * len(weights)
    with _quiet(), redirect_stderr(StringIO()), torch.no_grad():  # where it fails it prints the graph
        return export(_WithWeights(behind, list(weights)), args, dynamic_shapes=shapes, strict=False)


def _alone(model: RankingModel) -> Iterator[tuple[str, _Behind]]:
    if model.interest is not None:
        yield _named("interest", model.interest), _Behind(model, ranker=False)
    yield _named("ranker", model.ranker), _Behind(model, interest=False)


def _parts(model: RankingModel) -> str:
    parts = [_named("ranker", model.ranker)]
    return " with ".join(parts if model.interest is None else [_named("interest", model.interest), *parts])


def _named(what: str, part: InterestModel | Ranker) -> str:
    return f"{what} '{part.name}'"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}"


@contextmanager
def _own_cache(place: Path) -> Iterator[None]:
    """Nothing of a compilation is left but its package; torch's own cache keeps what the compiler made of headers."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache(dir=str(place)):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of much that is of no concern here."""
    import warnings

    loud = logging.getLogger("torch")
    before = loud.level
    loud.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        loud.setLevel(before)
