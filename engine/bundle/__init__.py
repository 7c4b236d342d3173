"""A trained model on disk: `manifest.json` and files that can be memory-mapped; no pickle.

manifest.json            what it is, and the sha256 and length of every other file
config.yaml              the configuration, for people and for `plexrank train`
model.safetensors        the frozen ranking model
calibration.safetensors  task -> the map from logits to probabilities
features.safetensors     how numbers become features
statistics.safetensors   ids and counts a space; positives and newest event an item
drift.safetensors        how the training rows' values fall into buckets, to tell when the stream's differ (optional)
catalogue/               items, their attributes and encoded features
users.arrow              what is known of each user, newest history first (optional)
retrieval.safetensors    the frozen encoder (where the configuration has one)
optimizer.safetensors    Adagrad's sums and Adam's moments, from which learning goes on (optional)
vectors.safetensors      item vectors float32 [items, D], by catalogue row
"""

from engine.bundle.diff import diff
from engine.bundle.manifest import FileEntry, Manifest, PluginEntry, read_manifest
from engine.bundle.open import Bundle
from engine.bundle.show import show
from engine.bundle.verify import Verification, verify
from engine.bundle.write import check_free, write_bundle

__all__ = [
    "Bundle",
    "FileEntry",
    "Manifest",
    "PluginEntry",
    "Verification",
    "check_free",
    "diff",
    "read_manifest",
    "show",
    "verify",
    "write_bundle",
]
