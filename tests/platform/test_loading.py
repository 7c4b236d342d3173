"""Every mistake in a configuration is named with file, line, key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ConfigError, SchemaError
from engine.loading import load_config, located, with_overrides
from tests.platform.support import MINIMAL, write


def errors_of(path: Path, **overrides: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [line.removeprefix(f"{path}") for line in str(caught.value).splitlines()]


def test_a_right_file_gives_its_values_and_the_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.name == "ads"
    assert config.features[2].of == "item_id"
    assert config.embedding.name == "full"
    assert config.ranker.name == "mlp"


def test_a_sequence_takes_the_space_of_its_item(tmp_path: Path) -> None:
    text = MINIMAL.replace("{name: item_id}", "{name: item_id, space: things}")
    assert load_config(write(tmp_path, text)).features[2].space == "things"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: ads", "name: ads\nseeed: 1", ":2: seeed: unknown key; did you mean 'seed'?"),
        ("name: ads", "name: ads\nseed: many", ':2: seed: "many": should be a valid integer'),
        ("name: ads", "name: ads\nseed: true", ":2: seed: true: should be a valid integer"),
        ("name: ads", "name: ads\nseed: -1", ":2: seed: -1: should be greater than or equal to 0"),
        ("name: ads", "name: Ads!", ':1: name: "Ads!" does not match'),
        ("name: ads", "seed: 1", ":1: name: missing, and it has no default"),
        ("of: item_id}", "of: itm}", ":8: features[2].of: no feature named 'itm'; did you mean 'item_id'?"),
        ("of: item_id}", "of: user_id}", ":8: features[2].of: 'user_id' is of the user;"),
        ("of: item_id}", "of: history}", ":8: features[2].of: 'history' is sequence; a sequence lists a categorical"),
        ("of: item_id}", "of: item_id}\n  - {name: h, kind: sequence, of: item_id, max_length: 7}", "7 differs from"),
        (", of: item_id}", "}", ":8: features[2]: sequence 'history' needs 'of'"),
        ("of: item_id}", "of: item_id, space: x}", ":8: features[2].space: 'x' differs from 'item_id'"),
        ("{name: item_id}", "{name: item_id, off: x}", ":7: features[1].off: unknown key; did you mean 'of'?"),
        ("{name: item_id}", "{name: item_id, bins: 3}", ":7: features[1].bins: only a feature of kind numeric has it"),
        ("{name: item_id}", "{name: item_id, kind: sequnce}", "did you mean 'sequence'?"),
        ("{name: item_id}", "{name: item_id}\n  - {name: item_id}", ":5: features: feature named twice: item_id"),
        ("name: mean", "name: mea", ":9: interest.name: no plugin interests.mea; did you mean 'mean'?"),
        ("name: mean", "name: mean, options: {max_histry: 3}", "max_histry: unknown key; did you mean 'max_history'?"),
        ("name: mean", "name: mean, options: {max_history: 0}", ":9: interest.options.max_history: 0: should be"),
        ("  source: {interactions: clicks.csv}\n", "", ":2: data: names neither 'dataset'"),
        (
            "name: ads",
            "name: ads\nlearning:\n  join:\n    labels:\n      clickk: [view]",
            ":5: learning.join.labels.clickk: no task named 'clickk'; did you mean 'click'?",
        ),
        (
            "name: ads",
            "name: ads\nlearning: {join: {window_seconds: {buy: 5}}}",
            ":2: learning.join.window_seconds.buy: no task named 'buy' (data.labels: click)",
        ),
        ("name: ads", "name: ads\nplugins: [guard]", ":2: plugins[0]: no plugin moments.guard"),
        ("name: ads", "name: ads\ntraining: {optimizer: {dense_lr: .inf}}", "dense_lr: Infinity: should be a finite"),
        ("clicked}}", "clicked}}\n  user: null\n  split: {by: user_tail}", ":6: data.split.by: 'user_tail' needs"),
        ("clicked}}", "clicked}}\n  time: null", "data.split.by: 'time' needs data.time"),
        ("clicked}}", "clicked}}\n  split: {validation: 0.6, test: 0.5}", "leave nothing to train on"),
        ("name: ads", "name: ads\nretrieval: {loss: {name: sampled_sofmax}}", "did you mean 'sampled_softmax'?"),
        ("name: ads", "name: ads\nretrieval: {loss: {name: bce}}", "retrieval.loss.name: 'bce' is a loss of rankers;"),
        ("name: ads", "name: ads\ntraining: {loss: {name: sampled_softmax}}", "'sampled_softmax' is a loss of enc"),
        ("name: ads", "name: ads\nranker: {name: mlp, options: {hidden: [0]}}", ":2: ranker.options.hidden[0]: 0:"),
        ("{name: item_id}", "{name: item_id}\n  - {name: interest}", ":8: features[2].name: 'interest' is what the"),
        ("{click:", "{a/b:", ":4: data.labels.a/b: \"a/b\" does not match"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line_and_remedy(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in MINIMAL
    (error,) = errors_of(write(tmp_path, MINIMAL.replace(old, new, 1)))
    assert expected in error
    assert error.startswith(":")  # file:line


def test_an_interest_without_a_sequence_is_refused(tmp_path: Path) -> None:
    text = MINIMAL.replace("  - {name: history, kind: sequence, of: item_id}\n", "")
    assert errors_of(write(tmp_path, text)) == [
        ":8: interest: needs a feature of kind sequence (a history to read); add one, or set interest to null"
    ]


def test_features_of_one_space_have_one_width(tmp_path: Path) -> None:
    text = MINIMAL.replace("{name: item_id}", "{name: item_id, dim: 8}").replace("of: item_id", "of: item_id, dim: 4")
    assert errors_of(write(tmp_path, text)) == [
        ":8: features[2].dim: 4 differs from 8 of 'item_id', also of space 'item_id'"
    ]


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        MINIMAL.replace("name: ads", "name: ads\nseed: x").replace("kind: sequence", "kind: sq").replace("mean", "men")
    )
    assert [error.split(":")[1] for error in errors_of(write(tmp_path, text))] == ["2", "9", "10"]


def test_a_key_said_twice_names_both_lines(tmp_path: Path) -> None:
    assert errors_of(write(tmp_path, MINIMAL + "name: again\n")) == [":10: name: said twice; the first is in line 1"]


def test_text_that_is_no_yaml_names_the_line(tmp_path: Path) -> None:
    (error,) = errors_of(write(tmp_path, "name: ads\ndata: [1, 2\n"))
    assert error.startswith(":3: not YAML")


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "just words\n"])
def test_a_file_without_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (error,) = errors_of(write(tmp_path, text))
    assert "a configuration is a mapping of keys" in error


def test_python_objects_are_not_made(tmp_path: Path) -> None:
    path = write(tmp_path, "name: !!python/object/apply:os.system\n  [touch ran]\nseed: !!python/name:os.system\n")
    tags = "tag:yaml.org,2002:python/object/apply:os.system", "tag:yaml.org,2002:python/name:os.system"
    first, second = errors_of(path)
    assert first == f":1: name: no tag but YAML's own is read, not '{tags[0]}'"
    assert second == f":3: seed: could not determine a constructor for the tag '{tags[1]}'"
    assert not (tmp_path / "ran").exists()


def test_words_are_words_and_only_true_and_false_are_booleans(tmp_path: Path) -> None:
    text = MINIMAL + "serving: {token_env: NO, filter_seen: false}\n"
    serving = load_config(write(tmp_path, text)).serving
    assert (serving.token_env, serving.filter_seen) == ("NO", False)
    assert '"yes": should be a valid boolean' in errors_of(write(tmp_path, text.replace("false", "yes")))[0]


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path: Path) -> None:
    levels = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
    (error,) = errors_of(write(tmp_path, f"a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n{levels}\n"))
    assert "more than 50,000 values, aliases expanded" in error


@pytest.mark.parametrize("depth", [100, 5000])
def test_deep_nesting_is_refused(tmp_path: Path, depth: int) -> None:
    (error,) = errors_of(write(tmp_path, f"name: {'[' * depth}{']' * depth}\n"))
    assert "nested more than 32 levels deep" in error


def test_an_alias_of_itself_is_refused(tmp_path: Path) -> None:
    (error,) = errors_of(write(tmp_path, "name: &a [*a]\n"))
    assert "nested more than 32 levels deep" in error


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    (error,) = errors_of(write(tmp_path, "# " + "x" * 300_000))
    assert "300,002 bytes; a configuration has at most 262,144" in error


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff\n")
    assert errors_of(tmp_path / "bad.yaml") == [": not UTF-8 text at byte 6"]


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "films.yaml")
    (error,) = errors_of(tmp_path / "film.yaml")
    assert error == f": no such file; did you mean '{tmp_path}/films.yaml'?"


def test_merged_keys_and_short_floats_are_read(tmp_path: Path) -> None:
    text = MINIMAL + "training: {optimizer: {<<: {dense_lr: 5, embedding_lr: 2e-2}, dense_lr: 1e-3}}\n"
    optimizer = load_config(write(tmp_path, text)).training.optimizer
    assert (optimizer.dense_lr, optimizer.embedding_lr) == (0.001, 0.02)


def test_overrides_replace_values_and_make_sections(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    config = load_config(
        path, {"training.epochs": "3", "features[1].dim": "4", "interest": "null", "features.2.dim": 4}
    )
    assert (config.training.epochs, config.features[1].dim, config.interest) == (3, 4, None)


def test_another_plugin_does_not_inherit_the_options(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("{name: mean}", "{name: mean, options: {max_history: 5}}"))
    assert load_config(path, {"interest.name": "din"}).interest.options == {}
    assert load_config(path, {"interest.name": "mean"}).interest.options == {"max_history": 5}


def test_a_wrong_override_is_named_as_such(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    with pytest.raises(ConfigError, match=r"^--set: training.epochs: 0: should be greater than or equal to 1$"):
        load_config(path, {"training.epochs": "0"})
    with pytest.raises(ConfigError, match=r"--set: features\[9\]: the list has 3 entries"):
        load_config(path, {"features[9].dim": "1"})
    with pytest.raises(ConfigError, match="--set: seed is 3, which has no keys"):
        load_config(path, {"seed": 3, "seed.x": "1"})


def test_a_loaded_configuration_can_be_varied(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert with_overrides(config, {"interest.name": "din", "seed": 7}).interest.name == "din"
    assert with_overrides(config, {}) == config


def test_an_error_of_later_stages_gets_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    with pytest.raises(ConfigError) as caught, located(path):
        raise SchemaError("features[1].column: clicks.csv has no column 'item_id'")
    assert str(caught.value) == f"{path}:7: features[1].column: clicks.csv has no column 'item_id'"
    with pytest.raises(SchemaError, match=r"^other: x$"), located(path):
        raise SchemaError("other: x")
