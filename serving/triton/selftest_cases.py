"""Makes a bundle's self-test: requests of all kinds with what the in-process scorer says to them."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np

from engine.bundle import Bundle
from engine.components import Scorer, ScoreRequest, UserState
from engine.inference.signature import CANDIDATES
from engine.inference.tensors import encode
from serving.triton.selftest import Case, SelfTest

_UNKNOWN = ["no such item", "ไม่มี", ""]
_MOST, _MOST_ITEMS = 200, 2000


def made(bundle: Bundle, scorer: Scorer) -> SelfTest:
    """Eight requests of 0 to 200 candidates. scorer: has loaded the bundle."""
    known = bundle.catalogue.ids(np.arange(min(_MOST, len(bundle.catalogue)))) or ["item"]
    item, users = bundle.schema.item, [_as_asked(bundle, user) for user in islice(bundle.users(), 2)]

    def request(items: list[str], past: list[str], user: int = 0) -> ScoreRequest:
        who = users[user] if user < len(users) else {}
        return ScoreRequest(user=who, history={item: past} if item and past else {}, items=items)

    many = (known * (1 + _MOST // len(known)))[:_MOST]
    requests = [
        (request(known[:8], known[:4]), False),
        (request(known[:1], known), False),
        (request(many, known[:50], 1), False),
        (request(known[:50], [], 2), False),
        (request([*known[:5], *_UNKNOWN], [*_UNKNOWN, *known[:3]], 1), False),
        (request([*known[-20:], *_UNKNOWN], known[:7]), True),
        (request([], known[:2]), False),
    ]
    cases = [_case(bundle, scorer, its, apart) for its, apart in requests]
    bare = _case(bundle, scorer, ScoreRequest({}, {}, known[:30]), False)
    cases.append(Case({CANDIDATES: bare.inputs[CANDIDATES]}, bare.expected))
    return SelfTest(cases[0].inputs, cases[0].expected, bundle.version, tuple(cases[1:]))


def of_all_sizes(bundle: Bundle) -> list[dict[str, np.ndarray]]:
    """Requests of 1 to 2,000 candidates with histories from none to the longest, as tensors."""
    known = bundle.catalogue.ids(np.arange(min(_MOST_ITEMS, len(bundle.catalogue)))) or ["item"]
    users, item = [_as_asked(bundle, user) for user in islice(bundle.users(), 8)] or [{}], bundle.schema.item
    longest = max((s.max_length for s in bundle.schema.sequences), default=0)
    asked: list[dict[str, np.ndarray]] = []
    for items in (1, 2, 5, 64, 500, _MOST_ITEMS):
        for past in sorted({0, 1, 2, longest // 2, longest}):
            first = 7 * len(asked)
            picked = [known[(first + n) % len(known)] for n in range(items)]
            history = [known[(3 * first + n) % len(known)] for n in range(past)]
            who = users[len(asked) % len(users)]
            request = ScoreRequest(user=who, history={item: history} if item and history else {}, items=picked)
            asked.append(encode(request, bundle.encoder, bundle.catalogue, items_apart=len(asked) % 4 == 3))
    return asked


def _case(bundle: Bundle, scorer: Scorer, request: ScoreRequest, apart: bool) -> Case:
    return Case(encode(request, bundle.encoder, bundle.catalogue, items_apart=apart), scorer.score(request).tasks)


def _as_asked(bundle: Bundle, user: UserState) -> dict[str, Any]:
    """What a request says of a user."""
    named = {f.name: user.user for f in bundle.schema.features if f.side == "user" and f.column == bundle.schema.user}
    return {**named, **user.features}
