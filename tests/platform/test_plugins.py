"""Components come from entry points by name; every way to be wrong names the distribution."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.components import KINDS
from engine.errors import PluginError
from engine.plugins import Plugins
from tests.platform.support import distribution, with_builtins

INTEREST = """
from engine.components import InterestModel, PluginOptions
from engine.hookspecs import hookimpl

class Late(InterestModel):
    \"\"\"Comes late.\"\"\"
    name = "late"
    class Options(PluginOptions):
        by: int = 3
    def forward(self, targets, history, user_of_target): return targets
    def explain(self, targets, history, user_of_target): return history

@hookimpl
def interests():
    return [Late]
"""


@pytest.fixture(autouse=True)
def _importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_third_party_component_is_found_by_its_name(tmp_path: Path) -> None:
    plugins = with_builtins(distribution(tmp_path, "acme", {"interests.late": "acme_a"}, {"acme_a": INTEREST}))
    assert plugins.get("interests", "late").summary() == "Comes late."
    assert "mean" in plugins.names("interests")


def test_nothing_is_imported_until_it_is_named(tmp_path: Path) -> None:
    code = "raise RuntimeError('imported')"
    plugins = with_builtins(distribution(tmp_path, "acme", {"interests.late": "acme_b"}, {"acme_b": code}))
    assert plugins.get("interests", "mean").name == "mean"
    with pytest.raises(PluginError, match=r"^acme: acme_b cannot be imported: RuntimeError: imported$"):
        plugins.get("interests", "late")


def test_two_of_one_name_are_refused_naming_both_distributions(tmp_path: Path) -> None:
    points = distribution(tmp_path, "acme", {"interests.din": "acme_c"}, {"acme_c": INTEREST})
    with pytest.raises(PluginError) as caught:
        with_builtins(points)
    assert "interests.din" in str(caught.value)
    assert "plexrank (plugins.interest.din)" in str(caught.value)
    assert "acme (acme_c)" in str(caught.value)


def test_two_distributions_may_not_share_a_name_even_for_one_module(tmp_path: Path) -> None:
    first = distribution(tmp_path / "1", "acme", {"interests.late": "acme_d"}, {})
    second = distribution(tmp_path / "2", "umbrella", {"interests.late": "acme_d"}, {})
    with pytest.raises(PluginError, match=r"acme \(acme_d\), one of umbrella \(acme_d\); rename or uninstall one"):
        Plugins([*first, *second])


def test_an_entry_point_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    points = distribution(tmp_path, "acme", {"interest.late": "acme_e"}, {})
    with pytest.raises(PluginError, match=r"acme: entry point 'interest.late' is not named 'kind.name'"):
        Plugins(points)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from engine.hookspecs import hookimpl\n@hookimpl\ndef interests(): return [dict]",
         "acme: m{}: hook 'interests' returned <class 'dict'>, not a subclass of InterestModel"),
        ("from engine.hookspecs import hookimpl\n@hookimpl\ndef interests(): return [3]",
         "acme: m{}: hook 'interests' returned 3, not a subclass of InterestModel"),
        ("from engine.hookspecs import hookimpl\n@hookimpl\ndef interests(): 1 / 0",
         "acme: m{}: hook 'interests' raised ZeroDivisionError: division by zero"),
        ("from engine.hookspecs import hookimpl\n@hookimpl\ndef intrests(): return []",
         "acme: m{}: unknown hook 'intrests'"),
        ("x = 1", "leads to m{}, whose hook 'interests' offers nothing, not 'late'"),
        (INTEREST.replace('"late"', '"early"'), "whose hook 'interests' offers ['early'], not 'late'"),
        (INTEREST.replace("name = ", "title = "), "returned Late, which has no `name`"),
        ("import no_such_module", "m{} cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def (", "acme: m{} cannot be imported: SyntaxError"),
    ],
)  # fmt: skip
def test_a_broken_module_is_named_with_its_fault(
    tmp_path: Path, request: pytest.FixtureRequest, code: str, expected: str
) -> None:
    number = str(abs(hash(request.node.name)))
    plugins = Plugins(distribution(tmp_path, "acme", {"interests.late": f"m{number}"}, {f"m{number}": code}))
    with pytest.raises(PluginError, match=re.escape(expected.format(number))):
        plugins.get("interests", "late")


def test_the_table_lists_all_and_says_which_is_broken(tmp_path: Path) -> None:
    points = distribution(
        tmp_path,
        "acme",
        {"interests.late": "acme_f", "rankers.gone": "acme_g", "moments.note": "acme_h"},
        {"acme_f": INTEREST, "acme_h": '"""Takes notes."""'},
    )
    rows = {(row.kind, row.name): row for row in Plugins(points).table()}
    late = rows["interests", "late"]
    assert (late.distribution, late.version, late.module, late.summary) == ("acme", "1.2", "acme_f", "Comes late.")
    assert late.options["by"]["default"] == 3
    assert rows["rankers", "gone"].summary.startswith("broken: acme: acme_g cannot be imported")
    assert rows["moments", "note"].summary == "Takes notes."


def test_every_built_in_loads_and_says_what_it_is() -> None:
    for row in Plugins().table():
        assert row.kind in (*KINDS, "moments")
        assert not row.summary.startswith("broken"), row
        assert row.summary.rstrip(".") != "", row


def test_a_load_can_be_traced(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLEXRANK_TRACE_PLUGINS", "1")
    Plugins().get("interests", "mean")
    assert "plexrank trace: load interests.mean from plugins.interest.mean (plexrank" in capsys.readouterr().err
