"""Stops publishing while the model that learns is worse than the bundle that it began with.

A figure counts as past its limit when it is so by more than chance (`SIGMAS` standard errors), on the same rows for
both models. The limits are for a whole window. A model that is well is now and then worse for a while: it has just met
some users whom it does not know. That evens out with the number of examples as a random walk does, so over n of them
log loss and AUC may be worse by sqrt(window / n) times as much. Judged are the newest 64, 128, 256 and 512 examples,
for a model that breaks at once, and, from `minimum` examples on, all that the window holds.

What is published should be what was judged: score a batch, observe it, judge, publish, and only then train on it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engine.config_learning import GuardConfig

SIGMAS = 3.0
LEAST_EACH = 16
"""Examples of each class without which a short span's mean loss says little."""
BREAK = 1.5
"""Log loss over the base's that is a break where there are fewer than that of a class."""


@dataclass(frozen=True)
class Verdict:
    """ok: whether to publish. reasons: why not, sentences with numbers. examples: judged since the start."""

    ok: bool
    reasons: tuple[str, ...]
    examples: int

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reasons": list(self.reasons)}


class Guard:
    """Judges figures of `ProgressiveValidation`; remembers which versions proved good.

    on_stop: called with the verdict and the last good version each time that publishing stops, if
    `learning.guard.rollback` is on: it tells the registry to go back, and puts the learner back, too. begun_with: the
    version that the learner began with, good until another has proved itself.
    """

    def __init__(
        self,
        config: GuardConfig,
        *,
        begun_with: str = "",
        on_stop: Callable[[Verdict, str], None] | None = None,
    ) -> None:
        self.config = config
        self._least = min(config.minimum, config.window)
        self._on_stop = on_stop
        self._stopped = False
        self._good_from: int | None = None  # while stopped: examples when the figures became good again
        self._proven = begun_with
        self._waiting: list[tuple[str, int]] = []  # published, with the examples at that time; oldest first

    @property
    def stopped(self) -> bool:
        return self._stopped

    @property
    def good(self) -> str:
        """The newest version after which the model stayed good for `minimum` examples."""
        return self._proven

    @property
    def needed(self) -> set[str]:
        """Versions that must not be removed: the last good one, and the next that may prove itself."""
        return {self._proven, *(version for version, _ in self._waiting[:1])}

    def published(self, version: str, examples: int) -> None:
        """A version to which one may go back (a bundle) was published when so many examples had been judged."""
        self._waiting = [*self._waiting[:1], *self._waiting[1:][-98:], (version, examples)]

    def removed(self, versions: Collection[str]) -> None:
        """One cannot go back to these any more."""
        self._waiting = [(version, since) for version, since in self._waiting if version not in versions]

    def judge(self, figures: Mapping[str, Any]) -> Verdict:
        """Looks at `ProgressiveValidation.figures()`.

        Before there are `minimum` examples only a break is looked for. After a stop the figures must be good for
        `minimum` more examples; until then the verdict says how many were.
        """
        examples, least = int(figures["examples"]), self._least
        wrong = tuple(r for task, its in figures["tasks"].items() for r in self._wrong(task, its))
        told = any(its["examples"] >= least for its in figures["tasks"].values())
        if wrong:
            self._good_from = None
            self._waiting.clear()  # what was published of late made it worse, or did not keep it from that
            verdict = Verdict(False, wrong, examples)
            if not self._stopped:
                self._stopped = True
                if self.config.rollback and self._on_stop is not None:
                    self._on_stop(verdict, self._proven)
            return verdict
        if self._stopped:
            self._good_from = examples if self._good_from is None else self._good_from
            good = examples - self._good_from
            if good < least or not told:
                reason = (
                    f"good for {good:,} examples again; publishing goes on after {least:,} (learning.guard.minimum)"
                )
                return Verdict(False, (reason,), examples)
            self._stopped, self._good_from = False, None
        if told:
            proved = [version for version, since in self._waiting if examples - since >= least]
            if proved:
                self._proven = proved[-1]
                self._waiting = [(v, n) for v, n in self._waiting if examples - n < least]
        return Verdict(True, (), examples)

    def state(self) -> dict[str, Any]:
        """What JSON can hold, for a checkpoint."""
        return {
            "stopped": self._stopped,
            "good_from": self._good_from,
            "proven": self._proven,
            "waiting": [list(w) for w in self._waiting],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self._stopped, self._good_from = bool(state["stopped"]), state["good_from"]
        self._proven = str(state["proven"])
        self._waiting = [(str(version), int(since)) for version, since in state["waiting"]]

    def _wrong(self, task: str, its: Mapping[str, Any]) -> list[str]:
        """What is past its limit, one sentence each."""
        limits, found = self.config, []
        if its["not_finite"]:
            found.append(f"{its['not_finite']:,} scores of task '{task}' are no finite numbers: the model has diverged")
        found += self._broken(task, its)
        if its["examples"] < self._least:
            return found
        base, room = its["base"], self._room(its["examples"])
        if limits.logloss_ratio is not None and base is not None and not found:
            found += _loss(task, its, base["logloss"], 1 + (limits.logloss_ratio - 1) * room)
        gain, most = its["auc_gain"], (limits.auc_drop or 0) * room
        if limits.auc_drop is not None and gain is not None and -gain - SIGMAS * its["auc_error"] > most:
            found.append(
                f"AUC of task '{task}' is {its['auc']:.4f} over the newest {its['examples']:,} examples, {-gain:.4f} "
                f"below the {base['auc']:.4f} of the bundle it began with on the same rows; at most {most:.3g} is "
                "allowed over so many (learning.guard.auc_drop)"
            )
        often, positives = its["calibration"], its["positives"]
        if limits.calibration is not None and often is not None and positives:
            chance = SIGMAS * often / positives**0.5
            others = abs(base["calibration"] - 1) if base is not None else 0.0  # going back would not mend that
            if abs(often - 1) - chance > limits.calibration and abs(often - 1) > others:
                found.append(
                    f"task '{task}' is predicted {often:.3f} times as often as it is seen over the newest "
                    f"{its['examples']:,} examples ({positives:,} positives); at most {limits.calibration:g} from 1 is "
                    "allowed (learning.guard.calibration)"
                )
        return found

    def _room(self, examples: int) -> float:
        """How many times the limits of a window are the limits of so many examples."""
        return max(1.0, self.config.window / examples) ** 0.5

    def _broken(self, task: str, its: Mapping[str, Any]) -> list[str]:
        """The shortest span of newest examples on which log loss is past the limit."""
        limit = self.config.logloss_ratio
        for span in its["recent"] if limit is not None else ():
            level, others = span["base_logloss"], span["examples"] - span["positives"]
            most = 1 + ((limit or BREAK) - 1) * self._room(span["examples"])
            if min(span["positives"], others) < LEAST_EACH:  # the small loss of one class is soon exceeded
                level, most = max(level, its["base"]["logloss"]), max(most, BREAK)
            if wrong := _loss(task, span, level, most):
                return wrong
        return []


def _loss(task: str, span: Mapping[str, Any], base: float, limit: float) -> list[str]:
    """A sentence if the log loss of a span's rows is past `limit` times the base's by more than chance."""
    excess = float(span["excess"])
    if excess - SIGMAS * span["excess_error"] <= (limit - 1) * base:
        return []
    return [
        f"log loss of task '{task}' is {base + excess:.4f} over the newest {span['examples']:,} examples, "
        f"{(base + excess) / base:.2f} times the {base:.4f} of the bundle it began with on the same rows; at most "
        f"{limit:.3g} is allowed over so many (learning.guard.logloss_ratio)"
    ]
