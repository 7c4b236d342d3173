"""The one pass over the interactions: columns become plain arrays on disk, ids are numbered as they appear."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from engine.catalogue import text_ids
from engine.config import LabelConfig
from engine.data.encoding import encode_ids, encode_lists, encode_numbers, one_array, without_nan
from engine.data.plan import Plan, split_key
from engine.data.store import Store
from engine.errors import DataError
from engine.hashing import canonical, mix, seed_of

SPLITS = ("train", "validation", "test")
_NAMES = {"train": 0, "validation": 1, "valid": 1, "val": 1, "test": 2}


class IdIndex:
    """Distinct ids in the order of their first appearance; memory grows with them, not with the rows."""

    def __init__(self, known: pa.Array | None = None) -> None:
        self.rows: dict[str, int] = {}
        for text in known.to_pylist() if known is not None else ():
            if text is None or text in self.rows:
                raise DataError(f"a table of attributes has {'an empty id' if text is None else f'id {text} twice'}")
            self.rows[text] = len(self.rows)

    def add(self, column: pa.Array) -> np.ndarray:
        """int32 [n]: each row's number; -1 where the id is missing."""
        encoded = one_array(without_nan(column))
        if not pa.types.is_dictionary(encoded.type):
            encoded = pc.dictionary_encode(encoded)
        number = self.rows.setdefault
        texts = (None if v is None else canonical(v) for v in encoded.dictionary.to_pylist())
        numbers = np.array([-1 if not t else number(t, len(self.rows)) for t in texts] + [-1], dtype=np.int32)
        codes = pc.fill_null(encoded.indices.cast(pa.int64()), len(numbers) - 1)
        return numbers[codes.to_numpy(zero_copy_only=False)]

    def ids(self) -> list[str]:
        return list(self.rows)

    def ranks(self) -> np.ndarray:
        """int64 [V + 1]: place of each id, numbers in their order, else as text; the last (missing) is -1."""
        texts = self.ids()
        if all(t.isascii() and t.isdigit() and len(t) < 19 for t in texts):
            order = np.argsort(np.array([int(t) for t in texts], dtype=np.int64), kind="stable")
        else:
            order = np.array(sorted(range(len(texts)), key=texts.__getitem__), dtype=np.int64)
        ranks = np.full(len(texts) + 1, -1, dtype=np.int64)
        ranks[order] = np.arange(len(texts))
        return ranks


def ingest(plan: Plan, store: Store, progress: Callable[[str, float], None]) -> tuple[IdIndex | None, IdIndex | None]:
    """Fills the store; the users and the items that appear.

    Arrays: user, item int32 [n] (-1 missing); time int64 [n]; labels float32 [n, tasks]; code uint8 [n] (split, where
    a column or a hash decides it); ids int64 [n, k]; raw float32 [n, q] numbers before their transform;
    `<name>.values` and `<name>.lengths` of jagged features.
    """
    data = plan.config.data
    users = IdIndex(_known(plan, "user")) if data.user else None
    items = IdIndex(_known(plan, "item")) if data.item else None
    ids = [f for f in plan.row_ids if f.kind != "numeric"]
    numbers = [f for f in plan.by_row if f.kind == "numeric"]
    key = split_key(plan.config)
    with ExitStack() as stack:

        def array(name: str, dtype: str, width: int | None = None) -> Callable[[np.ndarray], None]:
            return stack.enter_context(store.appender(name, dtype, width)).append

        put_user, put_item = array("user", "i4"), array("item", "i4")
        put_time, put_labels = array("time", "i8"), array("labels", "f4", len(data.labels))
        put_ids, put_raw = array("hashed", "i8", len(ids)), array("raw", "f4", len(numbers))
        put_code = array("code", "u1") if data.split.by in ("column", "hash") else None
        lists = {f: (array(f"{f.name}.values", "i8"), array(f"{f.name}.lengths", "i4")) for f in plan.row_lists}
        total = 0
        for batch in plan.interactions.batches(plan.columns()):
            n = batch.num_rows
            put_user(users.add(batch.column(data.user)) if users and data.user else np.full(n, -1))
            put_item(items.add(batch.column(data.item)) if items and data.item else np.full(n, -1))
            put_time(seconds(batch.column(data.time), data.time) if data.time else np.arange(total, total + n))
            put_labels(_stack([label_of(batch.column(c.column), c, t) for t, c in data.labels.items()], n, "f4"))
            put_ids(_stack([encode_ids(batch.column(f.column)) for f in ids], n, "i8"))
            put_raw(_stack([encode_numbers(batch.column(f.column), f.name) for f in numbers], n, "f4"))
            if put_code is not None and data.split.by == "column" and data.split.column:
                put_code(_named_split(batch.column(data.split.column), data.split.column))
            elif put_code is not None and key:
                put_code(_hashed_split(batch.column(key), data.split.validation, data.split.test))
            lengths = set()
            for feature, (put_values, put_lengths) in lists.items():
                column = encode_lists(batch.column(feature.column), feature)
                assert column.offsets is not None
                put_values(column.values)
                put_lengths(np.diff(column.offsets))
                if feature.kind == "sequence":
                    lengths.add(np.diff(column.offsets).tobytes())
            if len(lengths) > 1:
                raise DataError("sequence features have different lengths in one row; they list the same events")
            total += n
            progress("reading", 0.0)
    if not total:
        raise DataError(f"{plan.interactions.files[0]}: no rows")
    return users, items


def _known(plan: Plan, what: str) -> pa.Array | None:
    table, key = (plan.users, plan.config.data.user) if what == "user" else (plan.items, plan.config.data.item)
    return text_ids(table.read([key]).column(key)) if table and key else None


def _stack(columns: list[np.ndarray], rows: int, dtype: str) -> np.ndarray:
    return np.stack(columns, axis=1) if columns else np.empty((rows, 0), dtype)


def seconds(column: pa.Array, name: str) -> np.ndarray:
    """A time column -> int64 [n] seconds since 1970. DataError where a value is missing or no time."""
    try:
        if pa.types.is_temporal(column.type):
            column = column.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
        elif pa.types.is_floating(column.type):
            column = pc.floor(column).cast(pa.int64())
        else:
            column = column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(f"data.time: column '{name}' does not hold times: {error}") from error
    if column.null_count:
        raise DataError(f"data.time: column '{name}' is empty in {column.null_count} rows; drop or fill them")
    return column.to_numpy(zero_copy_only=False)


def label_of(column: pa.Array, label: LabelConfig, task: str) -> np.ndarray:
    """float32 [n]. DataError where it is missing, or not in [0, 1] without `at_least`."""
    where = f"data.labels.{task}.column: '{label.column}'"
    try:
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{where} does not hold numbers: {error}") from error
    if not np.isfinite(values).all():
        raise DataError(f"{where} is empty or not finite in some rows; drop them first")
    if label.at_least is not None:
        return (values >= label.at_least).astype(np.float32)
    if len(values) and (values.min() < 0 or values.max() > 1):
        raise DataError(f"{where} holds {values.min():g}..{values.max():g}, not 0..1; set at_least")
    return values.astype(np.float32)


def _named_split(column: pa.Array, name: str) -> np.ndarray:
    encoded = pc.dictionary_encode(one_array(column))
    codes = []
    for value in encoded.dictionary.to_pylist():
        code = _NAMES.get(str(value).strip().lower())
        if code is None:
            raise DataError(f"data.split.column '{name}' holds {value!r}; it may hold train, validation and test")
        codes.append(code)
    if encoded.indices.null_count:
        raise DataError(f"data.split.column '{name}' is empty in {encoded.indices.null_count} rows")
    return np.array(codes, dtype=np.uint8)[encoded.indices.to_numpy(zero_copy_only=False)]


def _hashed_split(column: pa.Array, validation: float, test: float) -> np.ndarray:
    """Rows of one key go to one side; the share is of keys, by the mixed fingerprint as a fraction of 2**63."""
    mixed = mix(torch.from_numpy(encode_ids(column)), seed_of("split")).numpy()
    share = mixed / float(1 << 63)
    return np.where(share < test, 2, np.where(share < test + validation, 1, 0)).astype(np.uint8)
