"""Bundles that are broken or hostile are refused by name, and what was there stays whole."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.bundle import Bundle, verify, write_bundle
from engine.bundle.manifest import sealed
from engine.errors import BundleError
from engine.files import sha256
from engine.model import build_model
from engine.training.calibration import Calibration


@pytest.fixture(scope="module")
def parts(films, film_data, plugins):
    config = films.config()
    return {
        "config": config,
        "model": build_model(config, film_data.statistics, plugins, frozen=True),
        "prepared": film_data,
        "calibration": {"liked": Calibration()},
        "metrics": {},
        "plugins": plugins,
    }


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("b") / "whole", **parts).path


@pytest.fixture
def bundle(whole, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def refused(bundle: Path, *words: str, plugins=None) -> str:
    """Both doors refuse it and say why."""
    result = verify(bundle, plugins)
    assert not result.ok
    text = "\n".join(result.problems)
    for word in words:
        assert word in text
    if plugins is None:
        with pytest.raises(BundleError) as error:
            Bundle.open(bundle)
        for word in words:
            assert word in str(error.value)
    return text


def reseal(bundle: Path, **changes) -> None:
    """A manifest that fits the files, as an attacker or another tool would write it."""
    raw = json.loads((bundle / "manifest.json").read_text())
    names = [p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file() and p.name != "manifest.json"]
    raw["files"] = {n: {"sha256": sha256(bundle / n), "bytes": (bundle / n).stat().st_size} for n in names}
    raw.update(changes)
    del raw["digest"], raw["format"]
    (bundle / "manifest.json").write_text(json.dumps(sealed(raw).as_json()))


def edit_tensors(bundle: Path, change) -> None:
    tensors = {k: v.clone() for k, v in load_file(bundle / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, bundle / "model.safetensors")
    reseal(bundle)


def a_weight(tensors: dict[str, torch.Tensor]) -> str:
    return next(n for n, t in tensors.items() if t.is_floating_point() and t.ndim == 2)


FILES = [
    "model.safetensors",
    "calibration.safetensors",
    "features.safetensors",
    "statistics.safetensors",
    "drift.safetensors",
    "catalogue/items.arrow",
    "catalogue/encoded.safetensors",
    "users.arrow",
    "config.yaml",
]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(bundle, name):
    os.truncate(bundle / name, (bundle / name).stat().st_size // 2)
    refused(bundle, f"{name}: truncated")
    with pytest.raises(BundleError, match="truncated"):  # lengths are looked at even without verification
        Bundle.open(bundle, verify=False)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_named(bundle, name):
    raw = bytearray((bundle / name).read_bytes())
    raw[-1] ^= 1
    (bundle / name).write_bytes(raw)
    refused(bundle, f"{name}: edited or corrupted")


def test_a_longer_a_missing_and_an_extra_file_are_all_named_at_once(bundle):
    with (bundle / "users.arrow").open("ab") as file:
        file.write(b"more")
    (bundle / "model.safetensors").unlink()
    (bundle / "catalogue" / "model.pt").write_bytes(b"x")
    refused(bundle, "users.arrow: too long", "model.safetensors: missing", "catalogue/model.pt: extra")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ('{"format": 1,', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "a JSON object is wanted"),
        ("{}", "bundle format None"),
        ('{"format": 99}', "bundle format 99, this plexrank reads 1"),
        ('{"format": 1}', "name: Field required"),
    ],
)
def test_a_manifest_that_is_none_is_refused(bundle, text, says):
    (bundle / "manifest.json").write_text(text)
    refused(bundle, says)


def test_a_manifest_larger_than_four_mebibytes_is_not_read(bundle):
    (bundle / "manifest.json").write_bytes(b" " * (4 << 20) + b"{}")
    refused(bundle, "at most 4,194,304")


def test_an_edited_manifest_is_refused(bundle):
    path = bundle / "manifest.json"
    raw = json.loads(path.read_text())
    raw["metrics"] = {"auc": 0.999}
    path.write_text(json.dumps(raw))
    refused(bundle, "edited: it does not fit its own digest")


def test_an_unknown_field_is_refused(bundle):
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": "rm"}))
    refused(bundle, "run: Extra inputs are not permitted")


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/../../b", "a//b", "", ".", "..", "A.SAFETENSORS", "a\\b", "x\n", "a" * 65]
)
def test_names_that_could_lead_outside_are_refused(bundle, name):
    raw = json.loads((bundle / "manifest.json").read_text())
    raw["files"][name] = {"sha256": "0" * 64, "bytes": 0}
    del raw["digest"], raw["format"]
    (bundle / "manifest.json").write_text(json.dumps(sealed(raw).as_json()))
    refused(bundle, "refused file name")


@pytest.mark.parametrize("what", ["file", "folder", "manifest"])
def test_links_are_refused_even_if_what_they_lead_to_is_right(bundle, tmp_path, what):
    name = {"file": "model.safetensors", "folder": "catalogue", "manifest": "manifest.json"}[what]
    shutil.move(bundle / name, tmp_path / "away")
    (bundle / name).symlink_to(tmp_path / "away")
    refused(bundle, "no manifest.json" if what == "manifest" else "a symbolic link")


def test_a_folder_that_is_no_bundle_says_so(tmp_path):
    refused(tmp_path, "it has no manifest.json")
    refused(tmp_path / "nowhere", "no such bundle")


def test_numbers_that_are_not_finite_are_refused_though_every_checksum_is_right(bundle):
    edit_tensors(bundle, lambda t: t[a_weight(t)].view(-1)[3].fill_(float("inf")))
    refused(bundle, "model.safetensors: not finite: ")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update({a_weight(t): t[a_weight(t)][:, :-1].contiguous()}), "has shape"),
        (lambda t: t.update({a_weight(t): t[a_weight(t)].double()}), "has dtype float64, the model float32"),
        (lambda t: t.pop(a_weight(t)), "is missing"),
        (lambda t: t.update({"backdoor": torch.zeros(1)}), "backdoor is not of this model"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_named(bundle, plugins, change, says):
    edit_tensors(bundle, change)
    refused(bundle, "model.safetensors", says, plugins=plugins)
    with pytest.raises(BundleError, match=says):
        Bundle.open(bundle).model(plugins)


def test_another_schema_than_the_configurations_is_refused(bundle):
    raw = json.loads((bundle / "manifest.json").read_text())
    raw["schema"]["features"][0]["dim"] = 99
    reseal(bundle, schema=raw["schema"])
    refused(bundle, "schema and configuration disagree on user_id")


def test_a_configuration_of_another_plexrank_is_refused(bundle):
    raw = json.loads((bundle / "manifest.json").read_text())
    raw["config"]["training"]["warp"] = 9
    reseal(bundle, config=raw["config"])
    refused(bundle, "config.training.warp")


def test_a_file_that_is_no_safetensors_is_refused_and_never_unpickled(bundle, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    (bundle / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    reseal(bundle)
    refused(bundle, "model.safetensors: cannot be read as safetensors")
    assert not (tmp_path / "pwned").exists()


def test_a_header_that_promises_more_than_there_is_takes_no_memory(bundle):
    (bundle / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    reseal(bundle)
    refused(bundle, "model.safetensors: cannot be read as safetensors")


@pytest.mark.parametrize("name", ["catalogue/items.arrow", "users.arrow"])
def test_a_file_that_is_no_arrow_is_refused(bundle, name):
    (bundle / name).write_bytes(b"ARROW1\0\0 not really")
    reseal(bundle)
    assert name.split("/")[0] in verify(bundle).problems[0]


def test_a_catalogue_and_counts_of_unequal_length_are_refused(bundle):
    tensors = load_file(bundle / "statistics.safetensors")
    save_file(tensors | {"item_counts": torch.zeros(3, dtype=torch.int64)}, bundle / "statistics.safetensors")
    reseal(bundle)
    result = verify(bundle)
    assert "not one count an item" in result.problems[0]


def test_a_drift_reference_of_other_buckets_is_refused(bundle):
    tensors = load_file(bundle / "drift.safetensors")
    save_file(tensors | {"genres:counts": torch.zeros(3, dtype=torch.int64)}, bundle / "drift.safetensors")
    reseal(bundle)
    assert "drift.safetensors: 'genres:counts' has not one count a bucket" in verify(bundle).problems[0]


def test_a_bundle_without_a_drift_reference_is_whole(bundle):
    (bundle / "drift.safetensors").unlink()
    reseal(bundle)
    assert verify(bundle).ok
    assert Bundle.open(bundle).drift is None


def test_a_plugin_that_is_not_installed_is_named(bundle, plugins):
    from engine.errors import PluginError

    raw = json.loads((bundle / "manifest.json").read_text())
    raw["config"]["ranker"]["name"] = "theirs"
    reseal(bundle, config=raw["config"])
    with pytest.raises(PluginError, match=r"rankers\.theirs"):
        Bundle.open(bundle).model(plugins)
    assert "rankers.theirs" in verify(bundle, plugins).problems[0]


# ------------------------------------------------------------------------------------------------ writing
def test_a_full_disk_leaves_nothing_behind(parts, tmp_path):
    """A limit on the length of files stands for the disk: writes fail the same way."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, old[1]))
    try:
        with pytest.raises(BundleError, match="cannot be written"):
            write_bundle(tmp_path / "b", **parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_users_are_written_leaves_the_old_bundle_in_place(parts, whole, tmp_path):
    class Fails:
        def __getattr__(self, name):
            return getattr(parts["prepared"], name)

        def users(self):
            raise OSError(28, "No space left on device")

    path = Path(shutil.copytree(whole, tmp_path / "b"))
    with pytest.raises(BundleError, match="No space left on device"):
        write_bundle(path, **(parts | {"prepared": Fails()}), replace=True)
    assert verify(path).ok
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_kill_while_writing_leaves_no_half_bundle(parts, tmp_path):
    """kill -9 after the weights and before the users: the path must not exist, only a hidden folder beside it."""
    script = textwrap.dedent(
        """
        import json, sys, time
        from pathlib import Path
        from types import SimpleNamespace
        from engine.bundle import write_bundle
        from engine.config import Config
        from engine.data.prepare import prepare
        from engine.model import build_model
        from engine.plugins import Plugins

        config, out, cache = Config(**json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
        plugins = Plugins()
        prepared = prepare(config, plugins, cache=cache)

        class Slow:
            def __getattr__(self, name):
                return getattr(prepared, name)

            def users(self):
                print("weights are written", flush=True)
                time.sleep(60)
                return iter(())

        model = build_model(config, prepared.statistics, plugins, frozen=True)
        write_bundle(out, config=config, model=model, prepared=Slow(), calibration={}, metrics={}, plugins=plugins)
        """
    )
    arguments = [parts["config"].model_dump_json(), str(tmp_path / "out" / "b"), str(tmp_path / "cache")]
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout.readline() == "weights are written\n"
    time.sleep(0.1)
    child.kill()
    child.wait()
    left = [p.name for p in (tmp_path / "out").iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".b.tmp-")
    assert write_bundle(tmp_path / "out" / "b", **parts).version  # and the next one is not hindered


def test_equal_bundles_are_equal_byte_by_byte_but_for_their_date(parts, whole, tmp_path):
    again = write_bundle(tmp_path / "b", **parts).path
    for path in whole.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert path.read_bytes() == (again / path.relative_to(whole)).read_bytes(), path.name


def test_a_calibration_that_would_change_the_order_is_refused(bundle):
    tensors = load_file(bundle / "calibration.safetensors")
    tensors["liked.slope"] = torch.tensor([-1.0], dtype=torch.float64)
    save_file(tensors, bundle / "calibration.safetensors")
    reseal(bundle)
    assert "'liked' is not an increasing map" in verify(bundle).problems[0]
    assert np.isfinite(Bundle.open(bundle).item_counts).all()
