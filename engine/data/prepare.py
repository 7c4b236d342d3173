"""From a configuration to batches: read once, keep the arrays, and never hold all rows in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from engine.catalogue import ArrowCatalogue
from engine.config import Config
from engine.data.cache import cached, default_cache, digest
from engine.data.encoder import FeatureEncoder
from engine.data.encoding import Encoded
from engine.data.history import build_histories, user_tail_codes
from engine.data.ingest import SPLITS, IdIndex, ingest
from engine.data.numeric import NumericTransforms
from engine.data.order import sort_by_time
from engine.data.plan import Plan, locate, make_plan
from engine.data.prepared import Prepared
from engine.data.statistics import IdCounter
from engine.data.store import Store, chunks
from engine.data.things import build_things, raw_features
from engine.errors import DataError
from engine.plugins import Plugins
from engine.schema import FeatureSpec

__all__ = ["Prepared", "prepare"]

Progress = Callable[[str, float], None]


def prepare(
    config: Config, plugins: Plugins, *, cache: Path | None = None, progress: Progress | None = None
) -> Prepared:
    """Brings the dataset here, converts it to memory-mapped arrays (once: they are cached) and opens them.

    cache: default `PLEXRANK_CACHE` or `~/.cache/plexrank`. progress: called with a stage's name and its share done.
    DataError where files are missing, broken or empty; SchemaError where features and columns do not fit.
    """
    cache = default_cache() if cache is None else cache
    tell = progress or (lambda stage, share: None)
    files = locate(config, plugins, cache)
    plan = make_plan(config, files)
    sources = [*files.interactions, *(p for p in (files.items, files.users) if p is not None)]
    folder = cache / "prepared" / digest(config, sources)
    cached(folder, lambda aside: _build(plan, Store(aside), tell))
    tell("data ready", 1.0)
    return Prepared(plan, folder)


def _build(plan: Plan, store: Store, tell: Progress) -> None:
    users, items = ingest(plan, store, tell)
    user_rank, item_rank = _ranks(users), _ranks(items)
    tell("sorting", 0.3)
    sort_by_time(store, user_rank, item_rank)
    if users is not None:
        tell("building histories", 0.5)
        length = max((f.max_length for f in plan.schema.sequences), default=1)
        build_histories(store, len(users.rows), item_rank, length)
    tell("splitting", 0.7)
    _split(plan, store)
    catalogue = build_things(plan, store, items, "item")
    people = build_things(plan, store, users, "user")
    tell("encoding", 0.8)
    numeric = _encode(plan, store, catalogue, people)
    tell("counting", 0.9)
    _count(plan, store, catalogue, people)
    save_file(numeric.to_tensors(), store.folder / "numeric.safetensors")
    for name, things in (("catalogue", catalogue), ("users", people)):
        (store.folder / name).mkdir()
        things.save(store.folder / name)
    store.save()


def _ranks(index: IdIndex | None) -> np.ndarray:
    return index.ranks() if index is not None else np.array([-1], dtype=np.int64)


# ---------------------------------------------------------------------------------------------------- splits
def _split(plan: Plan, store: Store) -> None:
    """Writes `split.<name>` and `positive.<name>`: rows int64, oldest first, all and those the first task likes."""
    split = plan.config.data.split
    order = store["order"]
    rows = len(order)
    if split.by == "user_tail":
        user_tail_codes(store, split.validation, split.test)
    edges = [round(rows * (1 - split.test - split.validation)), round(rows * (1 - split.test))]
    labels = store["labels"]
    writers = [(store.appender(f"split.{n}", "i8"), store.appender(f"positive.{n}", "i8")) for n in SPLITS]
    rates = np.zeros(3)
    for part in chunks(rows):
        chosen = order[part]
        place = np.arange(part.start, part.stop)
        code = np.searchsorted(edges, place, side="right") if split.by == "time" else store["code"][chosen]
        for number, (everything, positives) in enumerate(writers):
            mine = chosen[code == number]
            everything.append(mine)
            label = labels[mine, 0]
            positives.append(mine[label > 0])
            rates[number] += float(label.sum(dtype=np.float64))
    for everything, positives in writers:
        everything.close()
        positives.close()
    counts = [everything.rows for everything, _ in writers]
    if not counts[0]:
        raise DataError(f"the split by {split.by} leaves no training rows (of {rows})")
    meta = {
        "rows": dict(zip(SPLITS, counts, strict=True)),
        "label_rates": {n: rates[i] / counts[i] for i, n in enumerate(SPLITS) if counts[i]},
    }
    (store.folder / "meta.json").write_text(json.dumps(meta))
    if "code" in store:
        store.drop("code")


# -------------------------------------------------------------------------------------------------- encoding
def _encode(plan: Plan, store: Store, catalogue: ArrowCatalogue, people: ArrowCatalogue) -> NumericTransforms:
    """Fits the numeric transforms on training rows and writes `ids` int64 [n, k], `dense` float32 [n, m], offsets of
    jagged columns, and `sequence.<name>` int64 [P] along `past`."""
    sides = {"item": raw_features(plan, catalogue, "item"), "user": raw_features(plan, people, "user")}
    raw_columns = [f for f in plan.by_row if f.kind == "numeric"]
    train = store["split.train"]

    def values(feature: FeatureSpec) -> Iterator[np.ndarray]:
        place = plan.place(feature)
        for part in chunks(len(train)):
            rows = train[part]
            if place == "row":
                yield store["raw"][rows, raw_columns.index(feature)]
            else:
                yield np.append(sides[place][feature.name].values, np.float32(np.nan))[store[place][rows]]

    numbers = [f for f in plan.schema.features if f.kind == "numeric"]
    numeric = NumericTransforms.fit({f.name: values(f) for f in numbers}, numbers, len(train))
    encoder = FeatureEncoder(plan.schema, numeric)
    for side, things in (("item", catalogue), ("user", people)):
        for name, raw in sides[side].items():
            feature = plan.schema[name]
            things.encoded[name] = encoder.transform(feature, raw).with_neutral(encoder.neutral(feature))
    _rows(plan, store, encoder, raw_columns)
    for feature in plan.row_lists:
        _offsets(store, feature.name)
    if plan.from_log:
        _sequences(plan, store, catalogue)
    return numeric


def _rows(plan: Plan, store: Store, encoder: FeatureEncoder, raw_columns: list[FeatureSpec]) -> None:
    """Row-level ids and numbers side by side, so that a row is one place on disk."""
    rows = len(store["order"])
    hashed = [f for f in plan.row_ids if f.kind != "numeric"]
    with (
        store.appender("ids", "i8", len(plan.row_ids)) as put_ids,
        store.appender("dense", "f4", len(plan.row_numbers)) as put_dense,
    ):
        for part in chunks(rows):
            size = part.stop - part.start
            ids = np.empty((size, len(plan.row_ids)), dtype=np.int64)
            dense = np.empty((size, len(plan.row_numbers)), dtype=np.float32)
            for j, feature in enumerate(plan.row_ids):
                if feature.kind == "numeric":
                    raw = store["raw"][part, raw_columns.index(feature)]
                    ids[:, j] = encoder.transform(feature, Encoded(raw)).values
                else:
                    ids[:, j] = store["hashed"][part, hashed.index(feature)]
            for j, feature in enumerate(plan.row_numbers):
                raw = store["raw"][part, raw_columns.index(feature)]
                dense[:, j] = encoder.transform(feature, Encoded(raw)).values
            put_ids.append(ids)
            put_dense.append(dense)
    store.drop("hashed")
    store.drop("raw")


def _offsets(store: Store, name: str) -> None:
    lengths = store[f"{name}.lengths"]
    total = 0
    with store.appender(f"{name}.offsets", "i8") as put:
        put.append(np.zeros(1, np.int64))
        for part in chunks(len(lengths)):
            ends = total + np.cumsum(lengths[part], dtype=np.int64)
            put.append(ends)
            total = int(ends[-1])
    store.drop(f"{name}.lengths")


def _sequences(plan: Plan, store: Store, catalogue: ArrowCatalogue) -> None:
    past = store["past"]
    for sequence in plan.from_log:
        target = plan.schema[sequence.of]
        with store.appender(f"sequence.{sequence.name}", "i8") as put:
            for part in chunks(len(past)):
                rows = past[part]
                if target in plan.row_ids:
                    put.append(store["ids"][rows, plan.row_ids.index(target)])
                else:
                    put.append(catalogue.encoded[target.name].values[store["item"][rows]])


# -------------------------------------------------------------------------------------------------- counting
def _count(plan: Plan, store: Store, catalogue: ArrowCatalogue, people: ArrowCatalogue) -> None:
    """Writes `statistics.safetensors`, `item_counts` and `item_latest` int64 [items]."""
    train, everything = store["split.train"], store["order"]
    counters: dict[str, IdCounter] = {}
    counted = [f for f in plan.schema.embedded if f.kind != "sequence"]
    spaces = {f.space for f in counted}
    counted += [f for f in plan.row_lists if f.kind == "sequence" and f.space not in spaces]
    weights = {"item": np.zeros(len(catalogue) + 1, np.int64), "user": np.zeros(len(people) + 1, np.int64)}
    item_counts, latest = np.zeros(len(catalogue) + 1, np.int64), np.zeros(len(catalogue) + 1, np.int64)
    for feature in counted:
        counters.setdefault(feature.space, IdCounter())
    for part in chunks(len(train)):
        rows = train[part]
        for side, weight in weights.items():
            weight += np.bincount(store[side][rows].astype(np.int64) % len(weight), minlength=len(weight))
        positive = rows[store["labels"][rows, 0] > 0]
        item_counts += np.bincount(store["item"][positive].astype(np.int64) % len(latest), minlength=len(latest))
        ids = store["ids"][rows]
        for feature in counted:
            if plan.place(feature) != "row":
                continue
            if feature in plan.row_lists:
                column = Encoded(store[f"{feature.name}.values"], store[f"{feature.name}.offsets"])
                counters[feature.space].add(column.take(rows)[0])
            else:
                counters[feature.space].add(ids[:, plan.row_ids.index(feature)])
    for feature in counted:
        if (side := plan.place(feature)) in weights:
            column = (catalogue if side == "item" else people).encoded[feature.name]
            weight = weights[side]
            if column.offsets is not None:
                weight = np.repeat(weight, np.diff(column.offsets))
            counters[feature.space].add(column.values, weight)
    if plan.config.data.time:
        for part in chunks(len(everything)):
            rows = everything[part]
            latest[store["item"][rows]] = store["time"][rows]  # oldest first, so the newest stays
    store.create("item_counts", "i8", (len(catalogue),))[:] = item_counts[:-1]
    store.create("item_latest", "i8", (len(catalogue),))[:] = latest[:-1]
    tensors: dict[str, Tensor] = {}
    for space, counter in counters.items():
        tensors |= counter.statistics().to_tensors(space)
    save_file(tensors, store.folder / "statistics.safetensors")
