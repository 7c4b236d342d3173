"""How a broken clause is told."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from engine.components import KINDS, Component, PluginOptions
from engine.config import NAME

Options = Mapping[str, Any] | PluginOptions | None


class Contract:
    """One plugin against the promises of its kind."""

    def __init__(self, kind: str, cls: type[Any], options: Options) -> None:
        """Checks what every component promises: base class, name, one line of description, strict options."""
        self.kind = kind
        self.cls = cls
        self.label = f"{kind}.{getattr(cls, 'name', '?')} ({cls.__module__}.{cls.__qualname__})"
        base = KINDS[kind]
        self.holds(issubclass(cls, base), f"must be a subclass of {base.__name__}")
        name = getattr(cls, "name", None)
        self.holds(isinstance(name, str) and bool(re.match(NAME, name)), f"must have a `name` that matches {NAME}")
        self.holds(
            cls.__doc__ is not None and bool(cls.summary()), "must have a docstring whose first line says what it is"
        )
        self.holds(
            isinstance(cls.Options, type) and issubclass(cls.Options, PluginOptions),
            "must have `Options` derived from PluginOptions",
        )
        self.options = self._options(cls, options)
        try:
            cls.Options(**{**self.options.model_dump(), "no_such_option": 1})
        except ValidationError:
            pass
        else:
            self.fails("must refuse an option that it does not have (keep extra='forbid' in Options)")

    def _options(self, cls: type[Component], options: Options) -> PluginOptions:
        if isinstance(options, PluginOptions):
            self.holds(isinstance(options, cls.Options), f"was given options of {type(options).__qualname__}")
            return options
        try:
            return cls.Options(**(options or {}))
        except ValidationError as error:
            self.fails(f"cannot be checked with these options, give others: {error}")
        raise AssertionError  # `fails` raises

    def holds(self, condition: object, clause: str) -> None:
        """Raises AssertionError naming the plugin unless `condition` is true."""
        if not condition:
            self.fails(clause)

    def fails(self, clause: str) -> None:
        raise AssertionError(f"{self.label} {clause}")

    @contextmanager
    def when(self, what: str) -> Iterator[None]:
        """An exception inside is a broken clause too: `what` says what the plugin was doing."""
        try:
            yield
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{self.label} raised {type(error).__name__} {what}: {error}") from error

    def floats(self, value: object, shape: tuple[int, ...], what: str) -> None:
        """A finite float32 tensor of this shape."""
        self.holds(isinstance(value, Tensor), f"must give a tensor as {what}, not {type(value).__name__}")
        assert isinstance(value, Tensor)
        self.holds(tuple(value.shape) == shape, f"must give {what} of shape {shape}, not {tuple(value.shape)}")
        self.holds(value.dtype == torch.float32, f"must give {what} as float32, not {value.dtype}")
        self.holds(bool(torch.isfinite(value).all()), f"must give finite numbers as {what}")

    def equal(self, a: Tensor, b: Tensor, clause: str, tolerance: float = 1e-5) -> None:
        """Equal shapes and, up to a tolerance relative to the larger number, equal values."""
        near = a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        self.holds(near, clause)

    def gradients(self, loss: Tensor, inputs: Mapping[str, Tensor], module: nn.Module, every: bool = True) -> None:
        """The gradient of `loss` is finite everywhere, and reaches every input (or, with `every` false, one)."""
        with self.when("in the backward pass"):
            loss.backward()
        reached = [n for n, t in inputs.items() if t.grad is not None and bool((t.grad != 0).any())]
        for name, tensor in inputs.items():
            if tensor.grad is not None:
                self.holds(torch.isfinite(tensor.grad).all(), f"must give a finite gradient to {name}")
        if every:
            missing = sorted(set(inputs) - set(reached))
            self.holds(not missing, f"must let the gradient reach {', '.join(missing)}")
        else:
            self.holds(reached, f"must let the gradient reach one of {', '.join(inputs)}")
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                self.holds(torch.isfinite(parameter.grad).all(), f"must give a finite gradient to parameter {name}")

    def in_threads(self, work: Callable[[int], None], count: int = 4) -> None:
        """`work(number)` in `count` threads at once; what one raises is a broken clause."""
        with ThreadPoolExecutor(count) as pool:
            faults = [future.exception() for future in [pool.submit(work, n) for n in range(count)]]
        for fault in filter(None, faults):
            raise AssertionError(f"{self.label} must be safe from many threads: {fault}") from fault

    def reloads(self, module: nn.Module, other: nn.Module) -> None:
        """The state of one instance fits another: what a bundle relies on."""
        with self.when("loading the state of another instance"):
            other.load_state_dict(module.state_dict())
        other.eval()
