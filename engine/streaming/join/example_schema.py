"""Which model's features encoded examples are of."""

from __future__ import annotations

import hashlib

from engine.data.encoder import FeatureEncoder


def schema_id(encoder: FeatureEncoder) -> str:
    """32 hexadecimal digits over the schema and the numeric transforms: equal ids mean equal encodings."""
    digest = hashlib.sha256(encoder.schema.model_dump_json().encode())
    for name, tensor in sorted(encoder.numeric.to_tensors().items()):
        digest.update(name.encode() + b"\0" + tensor.numpy().tobytes())
    return digest.hexdigest()[:32]
