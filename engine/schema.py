"""Features: what a column means, whose it is, and which space of ids it shares."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FeatureKind = Literal["categorical", "multi", "sequence", "numeric"]
Side = Literal["user", "item", "context"]
NumericTransform = Literal["standard", "log", "bins"]


class FeatureSpec(BaseModel):
    """One feature.

    `side` says how many values a request brings: one for the user and the context (hour, device), one a candidate
    for an item. Features of one `space` share ids, rows and hash seeds: a history of items shares the item's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$", description="the feature's name; seeds come from it")
    kind: FeatureKind = Field("categorical", description="categorical, multi (several values), sequence or numeric")
    side: Side = Field("item", description="whose value it is: user, item or context")
    column: str = Field("", description="the column that feeds it; default: the feature's name")
    space: str = Field("", description="features of one space share a table and its rows; default: the feature's name")
    dim: int | None = Field(None, gt=0, le=4096, description="embedding width, in place of embedding.dim")
    lookups: int | None = Field(
        None, ge=1, le=16, description="lookups in a multiplexed table, in place of its default"
    )
    separator: str = Field("|", min_length=1, max_length=4, description="multi: what splits a string into values")
    of: str = Field("", description="sequence: the item feature whose past values it lists")
    max_length: int = Field(50, ge=1, le=10_000, description="sequence, multi: newest (first) values kept")
    transform: NumericTransform = Field("standard", description="numeric: standard score, log1p then standard, or bins")
    bins: int = Field(32, ge=2, le=4096, description="numeric with transform bins: number of quantile bins, embedded")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: object) -> object:
        if isinstance(data, dict) and isinstance(data.get("name"), str):
            data = dict(data)
            data["column"] = data.get("column") or data["name"]
            if data.get("kind") == "sequence":
                data["side"] = "user"
                data["space"] = data.get("space") or data.get("of") or data["name"]
            data["space"] = data.get("space") or data["name"]
        return data

    @property
    def is_dense(self) -> bool:
        """A number that reaches the network as it is (scaled), with no embedding."""
        return self.kind == "numeric" and self.transform != "bins"

    @property
    def is_jagged(self) -> bool:
        """Any number of values a row, also none."""
        return self.kind in ("multi", "sequence")

    @property
    def from_request(self) -> bool:
        """One value a request (user, context), not one a candidate."""
        return self.side != "item"


class Schema(BaseModel):
    """All features of a model, in the order of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: tuple[FeatureSpec, ...]
    user: str | None = Field("user_id", description="column that names the user")
    item: str | None = Field("item_id", description="column that names the item")
    time: str | None = Field("timestamp", description="column with the time, seconds since 1970")
    tasks: tuple[str, ...] = ("click",)

    def __getitem__(self, name: str) -> FeatureSpec:
        for feature in self.features:
            if feature.name == name:
                return feature
        raise KeyError(name)

    @property
    def embedded(self) -> list[FeatureSpec]:
        """Features with ids: they are the keys of `Batch.ids`, in this order."""
        return [f for f in self.features if not f.is_dense]

    @property
    def dense(self) -> list[FeatureSpec]:
        """Numeric features that reach the network as numbers; columns of `Batch.dense`, in this order."""
        return [f for f in self.features if f.is_dense]

    @property
    def sequences(self) -> list[FeatureSpec]:
        return [f for f in self.features if f.kind == "sequence"]

    def names_item(self, feature: FeatureSpec) -> bool:
        """Whether the feature is the item's id."""
        return feature.kind == "categorical" and feature.side == "item" and feature.column == self.item

    def of_item(self) -> list[FeatureSpec]:
        return [f for f in self.features if f.side == "item"]

    def of_request(self) -> list[FeatureSpec]:
        """User and context features: one value a request."""
        return [f for f in self.features if f.from_request]
