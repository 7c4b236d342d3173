"""The rows of a batch, checked: what is wrong with one row is said of that row alone."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.data.encoding import one_array
from engine.events import Arm, EventLimits, Features, RankingData, Reason, Value
from engine.hashing import fingerprint_column, fingerprints
from engine.streaming.events.arrow_events import JSON_COLUMNS, OPTIONAL


@dataclass(frozen=True, eq=False)
class BadRow:
    row: int
    reason: Reason
    detail: str


@dataclass(frozen=True, eq=False)
class InteractionRows:
    """The good rows, k of them: event, request, item, user int64 [k]; types: names, code int64 [k] among them;
    seconds float64 [k]. bad: the others."""

    event: np.ndarray
    request: np.ndarray
    item: np.ndarray
    user: np.ndarray
    types: list[str]
    code: np.ndarray
    seconds: np.ndarray
    bad: list[BadRow]


@dataclass(frozen=True, eq=False)
class RankingRows:
    """The good rows, r of them: data [r]; event, request int64 [r]; seconds float64 [r]. bad: the others."""

    data: list[RankingData]
    event: np.ndarray
    request: np.ndarray
    seconds: np.ndarray
    bad: list[BadRow]


class _Verdict:
    """The first fault of each row."""

    def __init__(self, table: pa.Table, limits: EventLimits, latest: float, future_seconds: float) -> None:
        self.table, self.limits = table, limits
        self.fault = np.zeros(table.num_rows, np.int16)
        self.faults: list[tuple[Reason, str]] = []
        self.seconds = _seconds(table)
        self.text("id", 256)
        self.text("source", 512)
        self.fails(np.isnan(self.seconds), Reason.SCHEMA, "column 'time' is null")
        self.fails(self.seconds < 0, Reason.PAST, "time lies before 1970")
        self.fails(
            self.seconds > latest,
            Reason.FUTURE,
            f"time lies more than {future_seconds:g} s ahead of this server's clock",
        )

    def fails(self, rows: np.ndarray, reason: Reason, detail: str) -> None:
        new = rows & (self.fault == 0)
        if new.any():
            self.faults.append((reason, detail))
            self.fault[new] = len(self.faults)

    def text(self, name: str, most: int) -> None:
        """Neither null nor empty nor of more than `most` characters."""
        lengths = pc.fill_null(pc.utf8_length(self._column(name)), 0).to_numpy(zero_copy_only=False)
        self.fails((lengths == 0) | (lengths > most), Reason.SCHEMA, f"column '{name}' needs 1 to {most} characters")

    def ids(self, name: str) -> None:
        column = self._column(name)
        empty, faulty = bad_ids(column, self.limits)
        self.fails(empty, Reason.SCHEMA, f"column '{name}' is null or empty")
        self.fails(faulty, Reason.ID, _id_said(name, self.limits))

    def id_lists(self, name: str) -> None:
        rows, flat = self._flat(name)
        empty, faulty = bad_ids(flat, self.limits)
        self.fails(self._any(rows, empty), Reason.SCHEMA, f"column '{name}' holds a null or an empty id")
        self.fails(self._any(rows, faulty), Reason.ID, _id_said(name, self.limits))

    def finite(self, name: str) -> None:
        if name not in self.table.column_names:
            return
        if pa.types.is_list(self.table.column(name).type):
            rows, flat = self._flat(name)
            bad = self._any(rows, _not_finite(flat))
        else:
            bad = _not_finite(self._column(name))
        self.fails(bad, Reason.NAN, f"column '{name}' holds a number that is not finite")

    def bad(self) -> list[BadRow]:
        return [BadRow(int(row), *self.faults[self.fault[row] - 1]) for row in np.flatnonzero(self.fault)]

    def _flat(self, name: str) -> tuple[np.ndarray, pa.Array]:
        """(row of each value, the values) of a column of lists; a null has none, whatever its offsets say."""
        column = self._column(name)
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        return np.repeat(np.arange(len(lengths)), lengths), pc.list_flatten(column)

    def _any(self, rows: np.ndarray, flags: np.ndarray) -> np.ndarray:
        found = np.zeros(self.table.num_rows, bool)
        found[rows[flags]] = True
        return found

    def _column(self, name: str) -> pa.Array:
        return one_array(self.table.column(name))


def interaction_rows(table: pa.Table, limits: EventLimits, latest: float, future_seconds: float) -> InteractionRows:
    """latest: the last second since 1970 that is not in the future: `future_seconds` ahead of some clock."""
    verdict = _Verdict(table, limits, latest, future_seconds)
    verdict.text("type", 64)
    verdict.ids("user")
    verdict.ids("item")
    lengths = pc.fill_null(pc.utf8_length(one_array(table.column("ranking"))), 0).to_numpy(zero_copy_only=False)
    verdict.fails(lengths > 256, Reason.SCHEMA, "column 'ranking' is longer than 256 characters")
    verdict.finite("value")
    if "position" in table.column_names:
        place = pc.fill_null(one_array(table.column("position")), 1).to_numpy(zero_copy_only=False)
        verdict.fails((place < 1) | (place > 1_000_000), Reason.SCHEMA, "column 'position' is not in 1 to 1,000,000")
    bad, seconds = verdict.bad(), verdict.seconds
    if bad:
        good = verdict.fault == 0
        table, seconds = table.filter(pa.array(good)), seconds[good]
    types = pc.dictionary_encode(one_array(table.column("type")))
    ranking = one_array(table.column("ranking"))
    named = pc.fill_null(pc.not_equal(ranking, ""), False).to_numpy(zero_copy_only=False)
    return InteractionRows(
        event=_event_prints(table),
        request=np.where(named, fingerprint_column(ranking), 0) if len(ranking) else np.empty(0, np.int64),
        item=fingerprint_column(table.column("item")),
        user=fingerprint_column(table.column("user")),
        types=types.dictionary.to_pylist(),
        code=types.indices.to_numpy(zero_copy_only=False).astype(np.int64),
        seconds=seconds,
        bad=bad,
    )


def ranking_rows(table: pa.Table, limits: EventLimits, latest: float, future_seconds: float) -> RankingRows:
    """As `interaction_rows`."""
    verdict = _Verdict(table, limits, latest, future_seconds)
    verdict.text("request_id", 256)
    verdict.ids("user")
    verdict.fails(
        one_array(table.column("items")).is_null().to_numpy(zero_copy_only=False),
        Reason.SCHEMA,
        "column 'items' is null",
    )
    verdict.id_lists("items")
    if "history" in table.column_names:
        verdict.id_lists("history")
    verdict.finite("score")
    verdict.finite("propensity")
    wanted = ("request_id", "user", "items", *OPTIONAL["ranking"])
    columns = {name: table.column(name).to_pylist() for name in wanted if name in table.column_names}
    shown: list[str] = [name for name in ("score", "position", "propensity") if name in columns]
    plain: list[str] = [name for name in OPTIONAL["ranking"] if name in columns and name not in shown]
    data: list[RankingData] = []
    kept, bad = np.flatnonzero(verdict.fault == 0).tolist(), verdict.bad()
    good = []
    for row in kept:
        try:
            data.append(_ranking(row, columns, shown, plain))
            good.append(row)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            bad.append(BadRow(row, Reason.SCHEMA, str(error)))
    table = table.take(pa.array(good, pa.int64()))
    return RankingRows(
        data=data,
        event=_event_prints(table),
        request=fingerprints(columns["request_id"][row] for row in good),
        seconds=verdict.seconds[np.asarray(good, np.int64)],
        bad=sorted(bad, key=lambda fault: fault.row),
    )


_JSON = {
    name: msgspec.json.Decoder(type_)
    for name, type_ in zip(JSON_COLUMNS, (list[Arm], Features, Features, dict[str, list[Value]]), strict=True)
}


def _ranking(row: int, columns: dict[str, list], shown: list[str], plain: list[str]) -> RankingData:  # type: ignore[type-arg]
    items = [{"id": id_} for id_ in columns["items"][row] or ()]
    for name in shown:
        values = columns[name][row]
        if values is None:
            continue
        if len(values) != len(items):
            raise ValueError(f"column '{name}' has {len(values)} values for {len(items)} items")
        for item, value in zip(items, values, strict=True):
            item[name] = value
    whole = {"request_id": columns["request_id"][row], "user": columns["user"][row], "items": items}
    for name in plain:
        value = columns[name][row]
        if value is not None:
            whole[name] = _JSON[name].decode(value) if name in _JSON else value
    return msgspec.convert(whole, RankingData)


def bad_ids(column: pa.Array, limits: EventLimits) -> tuple[np.ndarray, np.ndarray]:
    """(null or empty, too long or with control characters), bool [n] each."""
    lengths = pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False)
    faulty = lengths > limits.id_bytes
    data = column.buffers()[2]
    if data is not None:
        raw = np.frombuffer(data, np.uint8)
        if ((raw < 32) | (raw == 127)).any():
            control = pc.match_substring_regex(column, "[\\x00-\\x1f\\x7f]")
            faulty |= pc.fill_null(control, False).to_numpy(zero_copy_only=False)
    return lengths == 0, faulty


def _id_said(name: str, limits: EventLimits) -> str:
    return f"column '{name}' holds an id longer than {limits.id_bytes} bytes, or with control characters"


def _not_finite(column: pa.Array) -> np.ndarray:
    return ~np.isfinite(pc.fill_null(column, 0.0).to_numpy(zero_copy_only=False))


def _seconds(table: pa.Table) -> np.ndarray:
    micros = one_array(table.column("time")).cast(pa.int64())
    known = pc.fill_null(micros, 0).to_numpy(zero_copy_only=False) / 1e6
    return np.where(pc.is_null(micros).to_numpy(zero_copy_only=False), np.nan, known)


def _event_prints(table: pa.Table) -> np.ndarray:
    """As `fingerprint(event_name(source, id))`."""
    source = one_array(table.column("source"))
    length = pc.utf8_length(source).cast(pa.string())
    names = pc.binary_join_element_wise(length, pc.binary_join_element_wise(source, table.column("id"), ""), ":")
    return fingerprints(one_array(names).to_pylist() if isinstance(names, pa.ChunkedArray) else names.to_pylist())
