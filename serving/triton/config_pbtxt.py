"""`config.pbtxt`, written whole: Triton is to guess nothing, as it would start each model twice to do so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from engine.config_triton import TritonConfig
from engine.errors import BundleError, PlexrankError
from engine.inference.signature import Signature

_TYPE = "TYPE_"
PARAMETERS = ("live", "threads", "item_vectors_mb", "variant", "tables", "tolerance")
"""Fields of `TritonConfig` that Triton hands on to the model, or that the next export is to hold to."""


@dataclass(frozen=True)
class ModelConfig:
    """What a model's `config.pbtxt` says. It holds for all its versions: inputs are those that any of them reads.

    inputs: name -> (Triton's type without TYPE_, whether it may be left out); outputs: name -> type.
    """

    settings: TritonConfig
    inputs: Mapping[str, tuple[str, bool]]
    outputs: Mapping[str, str]

    @classmethod
    def of(cls, signature: Signature, settings: TritonConfig) -> Self:
        inputs = {spec.name: (spec.datatype, spec.optional) for spec in signature.inputs}
        return cls(settings, inputs, {spec.name: spec.datatype for spec in signature.outputs})

    @classmethod
    def read(cls, path: Path) -> Self:
        """PlexrankError for a file that is not one of an exported model."""
        try:
            from google.protobuf import text_format
            from tritonclient.grpc import model_config_pb2 as pb
        except ImportError as error:
            raise PlexrankError(f"{path} cannot be read ({error}): pip install 'plexrank[triton]'") from None
        try:
            found = text_format.Parse(path.read_text("utf-8"), pb.ModelConfig())
            said: dict[str, Any] = {
                name: found.parameters[name].string_value for name in PARAMETERS if name in found.parameters
            }
            said["instances"] = sum(max(1, group.count) for group in found.instance_group)
            said["batch_delay_us"] = found.dynamic_batching.max_queue_delay_microseconds
            said["max_batch"] = found.max_batch_size
            said["versions"] = found.version_policy.latest.num_versions
            settings = TritonConfig.model_validate(said)
        except OSError as error:
            raise PlexrankError(f"{path}: {error.strerror or error}") from None
        except (UnicodeDecodeError, text_format.ParseError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise PlexrankError(
                f"{path}: not written by `plexrank export triton` ({reason}); give the model another --name"
            ) from None
        types = pb.DataType.Name
        inputs = {i.name: (types(i.data_type).removeprefix(_TYPE), i.optional) for i in found.input}
        return cls(settings, inputs, {o.name: types(o.data_type).removeprefix(_TYPE) for o in found.output})

    def with_more(self, other: Self) -> Self:
        """With `other`'s settings, and the inputs and outputs of both. BundleError where a name has two types."""
        for what, mine, its in (("input", self.inputs, other.inputs), ("output", self.outputs, other.outputs)):
            for name, kind in its.items():
                if name in mine and mine[name] != kind:
                    raise BundleError(
                        f"{what} '{name}' is {_said(kind)} in this bundle and {_said(mine[name])} in the versions that "
                        "serve: give the model another --name"
                    )
        return type(self)(other.settings, {**self.inputs, **other.inputs}, {**self.outputs, **other.outputs})

    def text(self, name: str) -> str:
        """The file of a model of that name."""
        settings = self.settings
        batching = f"{{ max_queue_delay_microseconds: {settings.batch_delay_us} }}"
        lines = [f"name: {quoted(name)}", 'backend: "python"', f"max_batch_size: {settings.max_batch}"]
        for tensor, (datatype, optional) in self.inputs.items():
            more = " optional: true" if optional else ""
            lines.append(f"input [ {{ {_tensor(tensor, datatype)} allow_ragged_batch: true{more} }} ]")
        lines += [f"output [ {{ {_tensor(tensor, datatype)} }} ]" for tensor, datatype in self.outputs.items()]
        lines += [
            f"version_policy {{ latest {{ num_versions: {settings.versions} }} }}",
            f"dynamic_batching {batching}",
            f"instance_group [ {{ count: {settings.instances} kind: KIND_CPU }} ]",
        ]
        for key in PARAMETERS:
            value = quoted(str(getattr(settings, key)))
            lines.append(f"parameters {{ key: {quoted(key)} value {{ string_value: {value} }} }}")
        return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """As protobuf's text format reads it, whatever it holds."""
    plain = (chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\{b:03o}" for b in text.encode())
    return f'"{"".join(plain)}"'


def _tensor(name: str, datatype: str) -> str:
    return f"name: {quoted(name)} data_type: {_TYPE}{datatype} dims: [ -1 ]"


def _said(kind: str | tuple[str, bool]) -> str:
    return kind if isinstance(kind, str) else f"{kind[0]}{' (may be left out)' if kind[1] else ''}"
