"""The hot routes' JSON: decoded by msgspec from the raw body into columns, encoded from columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from engine.config import LimitsConfig
from engine.errors import EventError, RequestError
from engine.events import EventLimits, Features, Id, Value, check_id
from engine.hashing import canonical
from engine.pipeline import Answer

T = TypeVar("T")

Timeout = Annotated[int, Meta(ge=1, le=60_000, description="milliseconds until an answer is of use; default 100")]
_MOST = {"maxItems": 2000}  # as limits.items by default
Ids = Annotated[list[Id], Meta(max_length=20_000, extra_json_schema=_MOST)]
Columns = dict[Annotated[str, Meta(max_length=64)], list[Value]]


class ItemIn(Struct, forbid_unknown_fields=True):
    """An item with values of its own, which win over the catalogue's."""

    id: Id
    features: Features = {}


class RankIn(Struct, forbid_unknown_fields=True):
    """Order these items for this user."""

    items: Annotated[
        list[Id | ItemIn],
        Meta(max_length=20_000, description="ids, or objects with features", extra_json_schema=_MOST),
    ]
    user: Annotated[Id | None, Meta(description="whose stored history and features count")] = None
    history: Annotated[Ids | None, Meta(description="item ids, newest first, in place of the stored ones")] = None
    features: Annotated[Features, Meta(description="user features, by name")] = {}
    context: Annotated[Features, Meta(description="context features, by name")] = {}
    item_features: Annotated[Columns, Meta(description="feature -> one value an item; the quick form")] = {}
    timeout_ms: Timeout | None = None


class RecommendIn(Struct, forbid_unknown_fields=True):
    """Find items for this user."""

    user: Annotated[Id | None, Meta(description="whose stored history and features count")] = None
    count: Annotated[int, Meta(ge=1, le=500, description="items wanted")] = 20
    history: Annotated[Ids | None, Meta(description="item ids, newest first, in place of the stored ones")] = None
    features: Annotated[Features, Meta(description="user features, by name")] = {}
    context: Annotated[Features, Meta(description="context features, by name")] = {}
    exclude: Annotated[Ids, Meta(description="item ids that may not appear; <= 2,000")] = []
    timeout_ms: Timeout | None = None


class LoadIn(Struct, forbid_unknown_fields=True):
    """A bundle beside the one that serves."""

    name: Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9._-]{0,63}$", description="a folder of the models' folder")]


_Reason = Annotated[str, Meta(max_length=1000, description="kept with the version that is current")]


class PromoteIn(Struct, forbid_unknown_fields=True):
    """Serve a version of the registry."""

    reason: _Reason = "promoted"


class RollbackIn(Struct, forbid_unknown_fields=True):
    """Serve the version before, or the one that is named."""

    to: Annotated[str, Meta(pattern="^[0-9a-f]{12}$", description="a version of the registry")] | None = None
    reason: _Reason = "rolled back"


class PinIn(Struct, forbid_unknown_fields=True):
    """Serve exactly the current bundle."""

    reason: _Reason = "pinned"


class UnpinIn(Struct, forbid_unknown_fields=True):
    """Let learners publish again."""

    reason: _Reason = "unpinned"


class ModelOut(Struct):
    name: str
    version: str


class ItemOut(Struct, omit_defaults=True, gc=False):
    """score: probability of the first task; position: from 1; propensity: probability of standing there."""

    id: str
    score: float
    position: int
    propensity: float
    scores: dict[str, float] | None = None


class RankOut(Struct):
    """Items best first. stages and took_ms in milliseconds; degraded: what was lost on the way, empty when all went."""

    request_id: str
    model: ModelOut
    items: list[ItemOut]
    degraded: list[str]
    stages: dict[str, float]
    took_ms: float


encode = msgspec.json.Encoder().encode


@lru_cache(maxsize=32)
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


_WHERE = re.compile(r"^(?P<what>.*?) - at `(?P<key>key in )?(?P<path>\$[^`]*)`$", re.DOTALL)


def decode(body: bytes, kind: type[T]) -> T:
    """A body as one of the structs here. RequestError: 400 where it is not JSON, 422 where it does not fit."""
    try:
        decoded: T = _decoder(kind).decode(body)  # type: ignore[arg-type]
        return decoded
    except msgspec.ValidationError as error:
        found = _WHERE.match(str(error))
        if found:
            raise RequestError(found["what"], pointer=pointer(found["path"])) from None
        raise RequestError(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not JSON: {error}", status=400) from None
    except RecursionError:
        raise RequestError("the body is nested too deep", status=400) from None


def pointer(path: str) -> str:
    """`$.items[3].id` -> `/items/3/id` (RFC 6901); a key that msgspec does not name ends it."""
    parts = re.findall(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]", path)
    names = [name or index for name, index in parts]
    if "..." in names:
        names = names[: names.index("...")]
    return "".join("/" + name.replace("~", "~0").replace("/", "~1") for name in names)


def ids(values: Sequence[str | int], limits: LimitsConfig, where: str) -> list[str]:
    """Ids as canonical text. RequestError for too many, too long ones, or control characters."""
    if len(values) > limits.items:
        raise RequestError(f"{len(values)} ids are more than {limits.items}", pointer=f"/{where}")
    texts = [v if type(v) is str else canonical(v) for v in values]
    joined = "".join(texts)
    if joined.isascii() and joined.isprintable() and max(map(len, texts), default=0) <= limits.id_bytes:
        return texts
    for number, text in enumerate(texts):
        one_id(text, limits, f"/{where}/{number}")
    return texts


def one_id(value: str | int, limits: LimitsConfig, where: str) -> str:
    """One id as canonical text, checked."""
    try:
        return check_id(value, EventLimits(limits.id_bytes), "the id")
    except EventError as error:
        raise RequestError(str(error), pointer=where) from None


def rank_columns(request: RankIn, limits: LimitsConfig) -> tuple[list[str], Mapping[str, Sequence[Any]]]:
    """Items of both forms -> (ids, feature -> one value an item; None: the catalogue's)."""
    if len(request.items) > limits.items:
        raise RequestError(f"{len(request.items)} items are more than {limits.items}", pointer="/items")
    objects = [(n, item) for n, item in enumerate(request.items) if type(item) is ItemIn]
    if not objects:
        return ids(request.items, limits, "items"), request.item_features  # type: ignore[arg-type]
    texts = ids([item.id if type(item) is ItemIn else item for item in request.items], limits, "items")  # type: ignore[misc]
    columns: dict[str, list[Any]] = {name: list(values) for name, values in request.item_features.items()}
    for name, values in columns.items():
        if len(values) != len(texts):
            raise RequestError(
                f"item_features.{name} has {len(values)} values for {len(texts)} items",
                pointer=f"/item_features/{name}",
            )
    for number, item in objects:
        for name, value in item.features.items():
            columns.setdefault(name, [None] * len(texts))[number] = value
    return texts, columns


def encode_answer(answer: Answer) -> bytes:
    """An answer of the pipeline as JSON."""
    scores = answer.scores.tolist()
    propensity = answer.propensity.tolist()
    if answer.tasks:
        columns = [(task, values.tolist()) for task, values in answer.tasks.items()]
        items = [
            ItemOut(item, scores[n], n + 1, propensity[n], {task: values[n] for task, values in columns})
            for n, item in enumerate(answer.items)
        ]
    else:
        items = list(map(ItemOut, answer.items, scores, range(1, len(scores) + 1), propensity))
    return encode(
        RankOut(
            request_id=answer.request_id,
            model=ModelOut(answer.model, answer.version),
            items=items,
            degraded=answer.degraded,
            stages={stage: round(1e3 * seconds, 3) for stage, seconds in answer.stages.items()},
            took_ms=round(1e3 * answer.took, 3),
        )
    )
