"""The retrieval encoder's part of a delta: apart from the ranking model's, and into the encoder that serves.

Tables are called `retrieval:<table>` there and dense tensors `retrieval.<name>`, before their names in the encoder's
frozen form. The user's side has to follow together with the items' vectors of the same delta: only vectors of one
encoder can be compared.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from engine.retrieval import EncoderModel
from engine.streaming.deltas.apply import check_fit, write_rows
from engine.streaming.deltas.delta import Delta

TABLE, DENSE = "retrieval:", "retrieval."


def apart(delta: Delta) -> tuple[Delta, Delta]:
    """The delta as the ranking model reads it, without vectors; and the encoder's part of it by the encoder's names,
    with them (nothing may be in it)."""
    ours = {name: part for name, part in delta.tables.items() if not name.startswith(TABLE)}
    dense = {name: value for name, value in delta.dense.items() if not name.startswith(DENSE)}
    theirs = {name.removeprefix(TABLE): part for name, part in delta.tables.items() if name.startswith(TABLE)}
    towers = {name.removeprefix(DENSE): value for name, value in delta.dense.items() if name.startswith(DENSE)}
    return replace(delta, tables=ours, dense=dense, vectors=None), replace(delta, tables=theirs, dense=towers)


def with_part(tower: EncoderModel, part: Delta) -> EncoderModel:
    """An encoder with these rows and tensors; BundleError where they do not fit it, and nothing was changed.

    Rows are written in place, into tables that both share; the dense part is the second's own, so that a reader meets
    all of it or none. The tables must be this process's own, as those of an open bundle are.
    """
    check_fit(tower, part)
    write_rows(tower, part.tables)
    if not part.dense:
        return tower
    embedding = tower.embedding
    if any(name.startswith("embedding.") for name in part.dense):
        embedding = copy.deepcopy(embedding)
    second = EncoderModel(tower.schema, embedding, copy.deepcopy(tower.encoder), normalize=tower.normalize)
    with torch.no_grad():
        second.load_state_dict(dict(part.dense), strict=False)  # names were checked; the rest is the first's
    return second.eval().requires_grad_(False)
