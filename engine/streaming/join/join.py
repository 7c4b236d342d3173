"""Interactions meet the ranking that showed their item, in event time: labelled examples come out.

An impression is one shown item of one ranking. It becomes positive in a task at once when an interaction of one of the
task's types comes whose time is within the task's window, and negative when the watermark passes the window's end. In a
task that presumes negatives (`DelayedFeedback`), every impression is one before, at once or some seconds after its
ranking; what is not positive at the window's end is settled then.
Negatives may be thinned: a share `rate` of them stays, chosen by a hash. A model trained on thinned negatives says
logits that are too high by -ln(rate): logit = logit_trained + ln(rate) (He et al. 2014, section 6.3).

Every impression that came is, for each task, positive, negative, thinned or open; every interaction is one of joined,
repeats, late, orphans, foreign, unattributed, irrelevant or waiting. What comes out depends on the sequence of calls
and on nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine.config_learning import JoinConfig
from engine.errors import ConfigError
from engine.streaming.join.emitted import CORRECTION, NEGATIVE, POSITIVE, PRESUMED, SETTLED, Emitted, Rows
from engine.streaming.join.impressions import Impressions
from engine.streaming.join.shown import Shown
from engine.streaming.join.stages import Stages
from engine.streaming.join.thinning import uniform
from engine.streaming.join.waiting import WaitingInteractions

if TYPE_CHECKING:
    from engine.streaming.events.decode import Interactions, Rankings

_NONE = np.empty(0, np.int64)
_COUNTS = (
    "rankings", "duplicate_rankings", "refused_rankings", "impressions", "duplicate_items", "early",
    "interactions", "joined", "repeats", "late", "corrections", "lost_late",
    "orphans", "foreign", "unattributed", "irrelevant",
)  # fmt: skip


class Joiner:
    """Joins rankings and interactions; at most `config.max_pending` impressions are open, the oldest end early.

    tasks: the model's, in order. types: task -> interaction types that make it positive. seed: of the thinning.
    presumed: task -> seconds after a ranking at which its impressions are presumed negative; other tasks wait.
    As many ended impressions keep their features for late interactions, for as long as the longest window and
    `config.lateness_seconds`; as many interactions may wait for their ranking, for the longest window.

    counts: what came in and what became of it, since the first event:
        rankings, duplicate_rankings (the request is known already), refused_rankings, impressions, duplicate_items
        (twice in one ranking), early (impressions ended before their time for want of room);
        interactions, joined (made a task positive), repeats (of a task that was positive), late (behind the window),
        orphans (their ranking never came), foreign (their ranking did not show the item), unattributed (they name no
        ranking), irrelevant (of a type that makes no task positive);
        corrections, lost_late: examples from late interactions, and those that could not become one;
        `<task>.positives`, `<task>.negatives`, `<task>.thinned`: impressions; `<task>.presumed` where there are some.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        types: Mapping[str, Sequence[str]],
        config: JoinConfig,
        seed: int = 0,
        presumed: Mapping[str, float] | None = None,
    ) -> None:
        self.tasks, self.config, self.seed = tuple(tasks), config, seed
        self.stages = Stages(tasks, config, presumed or {})
        self._longest = self.stages.longest
        self._decides = _decisions(self.tasks, types)
        self.counts: dict[str, int] = dict.fromkeys(_COUNTS, 0)
        self.counts |= {f"{task}.{what}": 0 for task in tasks for what in ("positives", "negatives", "thinned")}
        self.counts |= {f"{task}.presumed": 0 for task in presumed or {}}
        self._shown = Impressions(
            self.stages.ends,
            self.stages.closing,
            self._longest + config.lateness_seconds,
            config.max_pending,
            keep_slots=config.late == "correct",
        )
        self._waiting = WaitingInteractions()
        self._watermark = -np.inf

    # ---------------------------------------------------------------------------------------------- calls
    def add(self, rankings: Rankings, interactions: Interactions, slots: Shown) -> Emitted:
        """Opens the impressions of rankings, then joins interactions, each in the order of the log.

        Every slot that is given comes back once in `freed`, of this call or of a later one.
        """
        rows = Rows()
        opened, unused = self._open(rankings, slots, rows)
        if len(opened) and (earlier := self._waiting.pop(opened)) is not None:
            row = self._shown.find(earlier["request"])
            self._join(row, earlier["item"], earlier["decides"], earlier["seconds"], rows, turn=0)
        foreign = self._interact(interactions, rows)
        early = self._shown.over()
        self.counts["early"] += len(self._shown.places(early)[0])
        turn = 2
        while len(early):
            self._end(early, rows, np.full(len(early), turn))
            early, turn = early[self._shown.of_ranking("stage")[early] < len(self._shown.closing)], turn + 1
        self.counts["orphans"] += self._waiting.trim(self.config.max_pending)
        freed = np.concatenate([unused, self._shown.tidy(self._watermark)])
        return rows.emitted(len(self.tasks), self.config.negatives, freed, foreign)

    def advance(self, watermark: float) -> Emitted:
        """Ends the windows that the watermark, seconds since 1970, has passed; one that goes back changes nothing.

        Negatives come in the order of their windows' ends, and then of their rankings.
        """
        self._watermark = max(self._watermark, watermark)
        rows = Rows()
        while len(due := self._shown.due(self._watermark)):
            self._end(due, rows, self._shown.closes(due))
        self.counts["orphans"] += self._waiting.expire(self._watermark - self._longest)
        return rows.emitted(len(self.tasks), self.config.negatives, self._shown.tidy(self._watermark), _NONE)

    def waiting(self) -> dict[str, int]:
        """What is not decided yet: `interactions` without their ranking, and task -> open impressions."""
        undecided = self._shown.undecided()
        return {"interactions": len(self._waiting)} | {
            task: int(((undecided >> t) & 1).sum()) for t, task in enumerate(self.tasks)
        }

    # ----------------------------------------------------------------------------------------------- steps
    def _open(self, rankings: Rankings, shown: Shown, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """-> requests that are new, and slots that are not needed."""
        count, counts = len(rankings.request), self.counts
        fresh = np.ones(count, bool)
        fresh[list(shown.refused)] = False
        good = np.flatnonzero(fresh)
        fresh[:] = False
        new = _first(rankings.request[good], good)
        fresh[new[self._shown.find(rankings.request[new]) < 0]] = True
        owner = np.repeat(np.arange(count), np.diff(shown.offsets))
        order = np.lexsort((shown.item, owner))
        twin = np.zeros(len(owner), bool)
        twin[order[1:]] = (np.diff(owner[order]) == 0) & (shown.item[order][1:] == shown.item[order][:-1])
        taken = fresh[owner] & ~twin
        counts["rankings"] += count
        counts["refused_rankings"] += count - len(good)
        counts["duplicate_rankings"] += len(good) - int(fresh.sum())
        counts["duplicate_items"] += int((twin & fresh[owner]).sum())
        counts["impressions"] += int(taken.sum())
        sizes = np.bincount(owner[taken], minlength=count)[fresh]
        requests = rankings.request[fresh]
        seconds, item, slot = rankings.seconds[fresh], shown.item[taken], shown.slot[taken]
        self._shown.open(requests, seconds, sizes, item, slot)
        if self.stages.at_once and len(item):
            request, time = np.repeat(requests, sizes), np.repeat(seconds, sizes)
            zeros = np.where(self._kept(request, item), self.stages.at_once, 0).astype(np.int32)
            keys = np.full(len(item), -1), np.arange(len(item))
            self._put_negatives(rows, keys, PRESUMED, slot, request, item, zeros, time)
        return requests, shown.slot[~taken]

    def _interact(self, interactions: Interactions, rows: Rows) -> np.ndarray:
        """-> which of the interactions are foreign."""
        counts, count = self.counts, len(interactions.request)
        counts["interactions"] += count
        if not count:
            return _NONE
        request, item, seconds = interactions.request, interactions.item, interactions.seconds
        decides = np.array([self._decides.get(name, 0) for name in interactions.type], np.int32)[interactions.code]
        counts["irrelevant"] += int((decides == 0).sum())
        some = np.flatnonzero(decides)
        counts["unattributed"] += int((request[some] == 0).sum())
        some = some[request[some] != 0]
        row = self._shown.find(request[some])
        known, early = some[row >= 0], some[row < 0]
        foreign = self._join(row[row >= 0], item[known], decides[known], seconds[known], rows, turn=1)
        lost = seconds[early] < self._watermark - self._longest
        counts["orphans"] += int(lost.sum())
        early = early[~lost]
        self._waiting.add(request[early], item[early], decides[early], seconds[early])
        return known[foreign]

    def _join(
        self, row: np.ndarray, item: np.ndarray, decides: np.ndarray, seconds: np.ndarray, rows: Rows, *, turn: int
    ) -> np.ndarray:
        """Interactions of known rankings (row int64 [k]), in order -> which of them are foreign."""
        if not len(row):
            return _NONE
        counts, shown = self.counts, self._shown
        place = shown.locate(row, item)
        foreign, here = np.flatnonzero(place < 0), place >= 0
        counts["foreign"] += len(foreign)
        row, decides, seconds, place = row[here], decides[here], seconds[here], place[here]
        base, stage = shown.of_ranking("seconds")[row], shown.of_ranking("stage")[row]
        positive, late = np.zeros(len(row), np.int32), np.zeros(len(row), np.int32)
        for task, name in enumerate(self.tasks):
            bit = np.int32(1 << task)
            some = np.flatnonzero((decides & ~shown.of_place("positive")[place]) & bit)
            in_time = (seconds[some] <= base[some] + self.stages.windows[task]) & (stage[some] <= self.stages.of[task])
            won, tardy = _first(place[some[in_time]], some[in_time]), some[~in_time]
            tardy = tardy[shown.of_place("corrected")[place[tardy]] & bit == 0]
            tardy = _first(place[tardy], tardy)
            tardy = tardy[~_preceded(place, tardy, won)]
            positive[won] |= bit
            late[tardy] |= bit
            shown.of_place("positive")[place[won]] |= bit
            shown.of_place("corrected")[place[tardy]] |= bit
            counts[f"{name}.positives"] += len(won)
        counts["joined"] += int((positive != 0).sum())
        counts["late"] += int(((positive == 0) & (late != 0)).sum())
        counts["repeats"] += int(((positive == 0) & (late == 0)).sum())
        slot = shown.of_place("slot")[place]
        correcting = (late != 0) & (slot >= 0) & (self.config.late == "correct")
        counts["corrections"] += int(correcting.sum())
        counts["lost_late"] += int((late != 0).sum()) - int(correcting.sum())
        request, items = shown.of_ranking("request")[row], shown.of_place("item")[place]
        for kind, which, ones in ((POSITIVE, positive != 0, positive), (CORRECTION, correcting, late)):
            at = np.flatnonzero(which)
            zeros = np.zeros(len(at), np.int32)
            rows.put((np.full(len(at), turn), at), kind, slot[at], request[at], items[at], ones[at], zeros, seconds[at])
        return foreign

    def _end(self, ending: np.ndarray, rows: Rows, turn: np.ndarray) -> None:
        """Ends the next window of rankings: what it decides and is not positive is negative. Or it is when they are
        presumed to be. turn [n]: sort keys."""
        shown, settling = self._shown, self.stages.settling
        place, row = shown.places(ending)
        stage = shown.of_ranking("stage")[row]
        presumed, zeros = self.stages.presuming[stage], shown.closing[stage] & ~shown.of_place("positive")[place]
        turn = np.repeat(turn, shown.of_ranking("size")[ending])
        some = np.flatnonzero(zeros | presumed)
        place, row, zeros, presumed, turn = place[some], row[some], zeros[some], presumed[some], turn[some]
        request, item = shown.of_ranking("request")[row], shown.of_place("item")[place]
        slot, seconds = shown.of_place("slot")[place], shown.of_ranking("seconds")[row]
        kept = self._kept(request, item)
        for task, name in enumerate(self.tasks):
            of_task = (zeros >> task) & 1
            self.counts[f"{name}.negatives"] += int(of_task[kept].sum())
            self.counts[f"{name}.thinned"] += int(of_task[~kept].sum())
        zeros, presumed = np.where(kept, zeros, 0), np.where(kept, presumed, 0)
        known = ((NEGATIVE, zeros & ~settling), (PRESUMED, presumed), (SETTLED, zeros & settling))
        for kind, its in known if settling else known[:1]:
            self._put_negatives(rows, (turn, row), kind, slot, request, item, its, seconds)
        shown.end_window(ending)

    def _kept(self, request: np.ndarray, item: np.ndarray) -> np.ndarray:
        """bool [n]: which impressions stay where they are negatives."""
        return uniform(request, item, self.seed) < self.config.negatives

    def _put_negatives(
        self,
        rows: Rows,
        order: tuple[np.ndarray, np.ndarray],
        kind: int,
        slot: np.ndarray,
        request: np.ndarray,
        item: np.ndarray,
        zeros: np.ndarray,
        seconds: np.ndarray,
    ) -> None:
        """Those of the impressions, columns [n], that are negative in some task: zeros int32 [n]."""
        if kind == PRESUMED:
            for task, name in enumerate(self.tasks):
                if (self.stages.settling >> task) & 1:
                    self.counts[f"{name}.presumed"] += int(((zeros >> task) & 1).sum())
        at = np.flatnonzero(zeros)
        ones = np.zeros(len(at), np.int32)
        keys = order[0][at], order[1][at]
        rows.put(keys, kind, slot[at], request[at], item[at], ones, zeros[at], seconds[at])

    # ----------------------------------------------------------------------------------------------- state
    def state(self) -> dict[str, np.ndarray]:
        """All that the next calls depend on; a joiner of the same tasks and windows goes on from it as this one."""
        return {
            **self.stages.state(),
            "watermark": np.array([self._watermark]),
            "counts": np.array(list(self.counts.values()), np.int64),
            **self._shown.state(),
            **self._waiting.state(),
        }

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """CheckpointError where the state is of other tasks, windows or feedback."""
        self.stages.check(state)
        self._watermark = float(state["watermark"][0])
        self.counts = dict(zip(self.counts, np.asarray(state["counts"]).tolist(), strict=True))
        self._shown.load(state)
        self._waiting.load(state)


def _first(keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Of numbers [n], ascending, the first of each key, by key."""
    return numbers[np.unique(keys, return_index=True)[1]]


def _preceded(place: np.ndarray, late: np.ndarray, won: np.ndarray) -> np.ndarray:
    """bool [n]: whether an interaction of `won` (by place, one each) stands before that of `late` of the same place."""
    if not len(won) or not len(late):
        return np.zeros(len(late), bool)
    at = np.minimum(np.searchsorted(place[won], place[late]), len(won) - 1)
    return (place[won[at]] == place[late]) & (won[at] < late)


def _decisions(tasks: Sequence[str], types: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Interaction type -> the tasks it makes positive, a bit each."""
    unknown = [task for task in types if task not in tasks]
    if unknown:
        raise ConfigError(f"learning.join.labels: no task '{unknown[0]}'; there are {', '.join(tasks)}")
    decides: dict[str, int] = {}
    for number, task in enumerate(tasks):
        for name in types.get(task, ()):
            decides[name] = decides.get(name, 0) | 1 << number
    return decides
