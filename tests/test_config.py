"""Configurations: what is read, what is refused and in which words, what the fingerprint covers."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.config import text
from p2pllm.config.base import Config
from p2pllm.config.load import load_either, load_peer, load_run, show
from p2pllm.config.peer import PeerConfig
from p2pllm.config.problems import keys_of, nearest, sub_config
from p2pllm.config.run import RunConfig
from p2pllm.errors import (
    ConfigInvalid,
    ConfigNotFound,
    ConfigUnreadable,
    PeerConfigNotFound,
    SettingsInvalid,
)

ROOT = Path(__file__).parent.parent
RUNS = sorted((ROOT / "configs").glob("*.yaml"))
PEERS = sorted((ROOT / "peers").glob("*/peer.yaml"))
brisk = settings(deadline=None, max_examples=60)  # the machine may be busy with other work

SMALL = "model: {name: some/model}\ndata: {source: rows.jsonl}\n"


@pytest.fixture
def written(tmp_path: Path):
    """Writes a file and gives its path."""

    def write(content: str, name: str = "small.yaml") -> Path:
        path = tmp_path / name
        path.write_text(content)
        return path

    return write


def refusal(path: Path | None, *settings: str, load: Any = load_run) -> str:
    with pytest.raises((ConfigInvalid, SettingsInvalid)) as caught:
        load(path, settings)
    return caught.value.letter


# ---- what ships


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_run_is_valid_and_named_after_its_file(path):
    run = load_run(path)
    assert run.name == path.stem
    assert run.description


@pytest.mark.parametrize("path", PEERS, ids=lambda path: path.parent.name)
def test_every_shipped_peer_is_valid(path):
    assert load_peer(path).output == Path("runs")


@pytest.mark.parametrize(
    "path", [*RUNS, *PEERS], ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_what_is_shown_loads_as_the_same_configuration(path, written):
    config = load_either(path)
    again = load_either(written(show(config), "other.yaml"))
    assert again == config


def test_the_cloud_recipe_is_yaml_and_names_files_that_ship():
    recipe = text.parse((ROOT / "peers/bootstrap/user-data.yaml").read_text()).value
    script = next(f["content"] for f in recipe["write_files"] if f["path"].endswith("install.sh"))
    assert "peers/bootstrap/p2pllm-bootstrap.service" in script
    assert (ROOT / "peers/bootstrap/p2pllm-bootstrap.service").is_file()


# ---- layers: file, then settings


def test_a_setting_wins_over_the_file(written):
    run = load_run(written(SMALL + "rounds: 3\n"), ["rounds=7", "training.learning_rate=1e-5"])
    assert (run.rounds, run.training.learning_rate) == (7, 1e-5)


def test_a_setting_leaves_the_other_keys_of_its_group_alone(written):
    run = load_run(written(SMALL + "lora: {r: 4, alpha: 99}\n"), ["lora.r=2", "lora.target=[a, b]"])
    assert (run.lora.r, run.lora.alpha, run.lora.target) == (2, 99, ("a", "b"))


@pytest.mark.parametrize("unit", ["steps", "epochs", "seconds"])
def test_setting_one_length_of_the_local_epoch_takes_the_others_back(written, unit):
    for before in ("steps", "epochs", "seconds"):
        path = written(SMALL + f"training: {{local: {{{before}: 9}}}}\n")
        local = load_run(path, [f"training.local.{unit}=5"]).training.local
        assert local.model_dump(exclude_none=True) == {unit: 5}


def test_a_setting_swaps_the_model_for_an_untrained_one_and_back(written):
    path = written(SMALL)
    assert load_run(path, ["model.random_init.layers=1"]).model.name is None
    settings = ["model.random_init={}", "model.name=other/model"]
    assert load_run(path, settings).model.random_init is None


def test_a_setting_does_not_reach_into_an_alias_of_its_group(written):
    path = written("model: {name: m}\ndata: {source: a, columns: &c {a: text}, split: x}\n")
    shared = load_run(path, ["data.columns.q=instruction"])
    assert shared.data.columns == {"a": "text", "q": "instruction"}


def test_a_run_may_say_its_own_name(written):
    assert load_run(written(SMALL + "name: mine\n")).name == "mine"


def test_a_peer_needs_no_file():
    assert load_peer(None) == PeerConfig()
    assert load_peer(None, ["threads=2", "network.client_only=true"]).network.client_only


def test_numbers_and_words_mean_what_they_look_like():
    plain = "a: 1e-3\nb: no\nc: 2024-01-01\nd: 010\ne: 1_000\nf: .5\ng:\nh: true\n"
    expected = [0.001, "no", "2024-01-01", "010", 1000, 0.5, None, True]
    assert list(text.parse(plain).value.values()) == expected


# ---- what is refused


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.locl_steps", "training.local.steps"),
        ("learning_rate", "training.learning_rate"),
        ("model.dtpye", "model.dtype"),
        ("lora.rank_dropout", "lora.dropout"),
        ("evaluation.evry", "evaluation.every"),
        ("trainig", "training"),
        ("averaging.deadline.celing", "averaging.deadline.ceiling"),
    ],
)
def test_an_unknown_key_gets_the_nearest_valid_name(written, key, meant):
    assert f"unknown key {key}; did you mean {meant}?" in refusal(written(SMALL), f"{key}=1")


@pytest.mark.parametrize("model", [RunConfig, PeerConfig])
@brisk
@given(data=st.data())
def test_a_key_that_lacks_one_letter_is_recognised(model: type[Config], data):
    keys = keys_of(model)
    long = [key for key in keys if len(key.rpartition(".")[2]) >= 4]
    key = data.draw(st.sampled_from(long))
    start = key.rfind(".") + 1
    gap = data.draw(st.integers(start, len(key) - 1))
    typo = key[:gap] + key[gap + 1 :]
    assert typo in keys or nearest(typo, keys) == key


def test_an_unknown_key_that_resembles_nothing_gets_the_valid_ones(written):
    assert "unknown key lora.zzz; valid here: r, alpha, dropout, target" in refusal(
        written(SMALL), "lora.zzz=1"
    )


def test_a_key_of_the_other_kind_is_sent_there(written):
    assert "unknown key device; it belongs in a peer's own peer.yaml" in refusal(
        written(SMALL), "device=cpu"
    )
    assert "unknown key rounds; it belongs in the run's file" in refusal(
        None, "rounds=3", load=load_peer
    )


def test_all_problems_come_in_one_letter_with_their_lines(written):
    bad = """\
rounds: 0
training:
  schedule: linaer
  local: {steps: 1, epochs: 2}
model: {name: m, dtyp: float32}
lora: {target: q_proj, r: 5000, dropout: x}
data: {source: [a, 3]}
averaging: 3
"""
    letter = refusal(written(bad), "seed=x", "foo", "rounds.x=1")
    for line in (
        "line 1: rounds is 0; it must be at least 1",
        "line 3: training.schedule is 'linaer'; it must be one of linear, cosine, constant",
        "line 4: training.local: give exactly one of steps, epochs and seconds",
        "line 5: unknown key model.dtyp; did you mean model.dtype?",
        "line 6: lora.r is 5000; it must be at least 1 and at most 1024",
        "line 6: lora.dropout is 'x'; it must be a number",
        "line 6: lora.target is 'q_proj'; it must be a list, such as [a, b], or one of",
        "line 7: data.source is ['a', 3]; it must be a list whose item 2 is text, in quotes",
        "line 8: averaging is 3; it must be a group of keys: compression, min_peers,",
        "--set: seed is 'x'; it must be a whole number",
        "--set foo: write it as key=value",
        "--set rounds.x=1: rounds is not a group of keys",
    ):
        assert f"  {line}" in letter


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' stands twice, first in line 1"),
        ("model:\n  name: a\n  name: b\n", "line 3: the key 'name' stands twice"),
        ("model: [\n", "line 2: "),
        ("true: 1\n", "line 1: the key True is not text"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("- 1\n", "the file must hold keys with values"),
        ("a: \x00\n", "unacceptable character"),
        ("[" * 999, "nested too deeply"),
        ("model: &m {name: *m}\ndata: {source: a}\n", "model.name is"),
        ("", "model is missing: The frozen base model"),
        ("model: {}\ndata: {source: a}\n", "give exactly one of model.name and model.random_init"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_the_reason(written, content, why):
    assert why in refusal(written(content))


def test_a_file_name_that_cannot_name_a_run_is_refused(written):
    assert "the file's name: name is 'My_Run'" in refusal(written(SMALL, "My_Run.yaml"))


def test_a_peer_file_given_as_a_run_is_recognised_and_the_reverse():
    laptop = ROOT / "peers/laptop/peer.yaml"
    assert "looks like a peer configuration" in refusal(laptop)
    assert "looks like a run configuration" in refusal(ROOT / "configs/tiny.yaml", load=load_peer)
    assert isinstance(load_either(laptop), PeerConfig)
    assert isinstance(load_either(ROOT / "configs/tiny.yaml"), RunConfig)


def test_a_file_that_cannot_be_read_gets_a_letter(tmp_path):
    with pytest.raises(ConfigNotFound, match="ls configs"):
        load_run(tmp_path / "none.yaml")
    with pytest.raises(PeerConfigNotFound, match="ls peers"):
        load_peer(tmp_path / "none.yaml")
    with pytest.raises(ConfigUnreadable, match="directory"):
        load_run(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"description: \xff\xfe\n")
    with pytest.raises(ConfigUnreadable, match="UTF-8"):
        load_run(tmp_path / "latin.yaml")


def test_a_letter_survives_braces_in_a_name(written):
    assert "{x}" in refusal(written("a: 1\n", "{x}.yaml"))


@brisk
@given(st.text(max_size=80))
def test_no_text_crashes_the_reader(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content.encode())
    with pytest.raises(ConfigInvalid):
        load_run(path)


# ---- text


@brisk
@given(
    st.one_of(
        st.text(), st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False),
        st.lists(st.text()), st.dictionaries(st.text(), st.text()),
    )
)  # fmt: skip
def test_what_is_written_reads_back_as_the_same_value(value):
    again = text.parse(text.line_of("key", value)).value["key"]
    assert again == value
    assert type(again) is type(value)


def test_each_shown_key_stands_under_its_description(written):
    shown = show(load_run(written(SMALL))).splitlines()
    assert (
        shown[shown.index("  alpha: 16") - 1] == "  # Scale: the update is multiplied by alpha / r."
    )
    keys = [n for n, line in enumerate(shown) if not line.lstrip().startswith("#")]
    assert all(shown[n - 1].lstrip().startswith("#") for n in keys)


# ---- documented fields and the fingerprint


@pytest.mark.parametrize("model", [RunConfig, PeerConfig])
def test_every_key_is_documented(model):
    groups = {key.rpartition(".")[0] for key in keys_of(model)}
    silent = [key for key, field in keys_of(model).items() if not field.description]
    assert set(silent) <= groups


FULL = """\
name: full
description: One.
model: {name: m, revision: r, weights_sha256: %s}
lora: {target: [a]}
data:
  {source: [a.jsonl], config_name: c, revision: r, columns: {q: instruction}, eval_source: [b]}
averaging: {clip: 5}
evaluation: {max_rows: 5}
""" % ("0" * 64)
# For each key a value that is valid and differs from the one in FULL; 13 where none is given.
OTHER = {
    "name": "other",
    "averaging.robust": "none",
    "averaging.lora": "alternate",
    "averaging.overlap": "true",
    "averaging.outer": "nesterov",
    "averaging.outer_momentum": "0.5",
    "model.weights_sha256": "f" * 64,
    "model.dtype": "float16",
    "model.quantization": "nf4",
    "lora.dropout": "0.5",
    "lora.target": "auto",
    "data.columns": "{a: context}",
    "data.template": "chat",
    "data.train_on": "all",
    "data.long_rows": "drop",
    "data.eval_size": "0.5",
    "data.replace": "{ChatDoctor: AI Assistant}",
    "data.streaming": "true",
    "training.optimizer": "adamw_8bit",
    "training.schedule": "cosine",
    "averaging.compression": "none",
    "averaging.carry": "0.25",
    "evaluation.on_trainers": "both",
    "checkpoint.at": "[13]",
    **dict.fromkeys(("model.name", "model.revision", "data.source", "data.config_name"), "zz"),
    **dict.fromkeys(("data.revision", "data.split", "data.eval_by"), "zz"),
    **dict.fromkeys(("data.eval_source", "data.eval_split"), "zz"),
}
AGREED = [
    key
    for key, field in keys_of(RunConfig).items()
    if not sub_config(field) and key != "description"
]


@pytest.mark.parametrize("key", AGREED)
def test_the_fingerprint_covers_every_agreed_key(written, key):
    path = written(FULL)
    base = ["model.random_init={}"] if key.startswith("model.random_init.") else []
    before, after = load_run(path, base), load_run(path, [*base, f"{key}={OTHER.get(key, '13')}"])
    assert after != before
    assert after.fingerprint != before.fingerprint


def test_the_description_is_not_part_of_the_agreement(written):
    path = written(FULL)
    assert load_run(path).fingerprint == load_run(path, ["description=Two."]).fingerprint


def test_the_fingerprint_does_not_depend_on_the_order_or_on_spelt_out_defaults(written):
    run = load_run(written("data: {source: a}\nmodel: {name: m}\n"))
    again = load_run(written("rounds: 10\nmodel: {dtype: bfloat16, name: m}\ndata: {source: a}\n"))
    assert run.fingerprint == again.fingerprint


def test_an_unknown_template_is_a_letter_with_the_names_there_are(written):
    with pytest.raises(ConfigInvalid, match="alpaca, dolly, llama2, chat"):
        load_run(written("model: {name: m}\ndata: {source: a, template: alpacca}\n"))


@pytest.mark.parametrize("rank", ["0", "-3", "9999", "many"])
def test_an_impossible_rank_is_a_letter_that_names_the_key(written, rank):
    with pytest.raises(ConfigInvalid, match=r"lora\.r"):
        load_run(written(f"model: {{name: m}}\ndata: {{source: a}}\nlora: {{r: {rank}}}\n"))


def test_a_micro_batch_is_a_number_or_found():
    for said, expected in (("4", 4), ('"4"', 4), ("auto", "auto"), ("null", None)):
        assert load_peer(None, [f"micro_batch={said}"]).micro_batch == expected
    for wrong in ("0", "much"):
        with pytest.raises(SettingsInvalid, match="micro_batch"):
            load_peer(None, [f"micro_batch={wrong}"])
