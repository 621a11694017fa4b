"""From UnitedLLM's configuration to ours: each key has a verdict, and the run starts and trains."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p2pllm.cli import app
from p2pllm.config.load import load_peer, load_run
from p2pllm.config.peer import PeerConfig
from p2pllm.config.problems import keys_of
from p2pllm.config.run import RunConfig
from p2pllm.config.unitedllm import RULES, read_unitedllm, translate
from p2pllm.errors import ConfigExists, ConfigUnreadable
from p2pllm.events import RoundCommitted, TrainerEvaluated
from p2pllm.roles.trainer import prepare
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.manifest import Manifest
from tests.churn import Churn, Peer

DATA = Path(__file__).parent / "data"
DOCUMENT, SHIPPED, HIDDEN = (
    DATA / f"unitedllm_{name}.yaml" for name in ("document", "shipped", "hidden")
)
RUNNER = CliRunner(env={"COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb"})


def verdicts_of(document):
    return {v.key.rpartition(".")[2]: v for v in translate(document).verdicts}


def verdict(value, key, **others):
    """What becomes of one key, beside others."""
    return verdicts_of({"args": {key: value, **others}})[key]


def run_keys(value, key, **others):
    return dict(verdict(value, key, **others).outcome.run)


@pytest.mark.parametrize("path", [DOCUMENT, SHIPPED, HIDDEN], ids=lambda path: path.stem)
def test_every_key_has_a_verdict_and_a_reason_where_it_is_lost(path):
    document = read_unitedllm(path)
    verdicts = translate(document).verdicts
    keys = [f"{group}.{key}" for group, content in document.items() for key in content]
    assert [v.key for v in verdicts if v.in_file] == keys
    assert [v.key for v in verdicts if v.fate == "unknown"] == []
    assert [v.key for v in verdicts if v.fate != "mapped" and not v.outcome.reason] == []


def test_nothing_of_the_two_real_files_is_refused_but_what_is_known_to_be():
    for path in (DOCUMENT, SHIPPED):
        refused = {k for k, v in verdicts_of(read_unitedllm(path)).items() if v.fate == "refused"}
        assert refused == {"load_pretrained", "deepspeed"}


@pytest.mark.parametrize("path", [DOCUMENT, SHIPPED], ids=lambda path: path.stem)
def test_the_real_files_become_a_valid_run_and_peer_with_the_same_meaning(tmp_path, path):
    run_out, peer_out = tmp_path / "seed.yaml", tmp_path / "peer.yaml"
    words = ["config", "import-unitedllm", str(path), "-o", str(run_out), "--peer-out"]
    result = RUNNER.invoke(app, [*words, str(peer_out)])
    assert result.exit_code == 0, result.output
    assert "load_pretrained" in result.output
    run, peer = load_run(run_out), load_peer(peer_out)
    assert (run.name, run.rounds, run.seed) == ("seed", 5, 1234)
    assert (run.model.name, run.model.dtype) == ("EleutherAI/pythia-70m", "float32")
    assert run.data.source == "fedml/databricks-dolly-15k-niid"
    assert run.data.long_rows == ("drop" if path == DOCUMENT else "truncate")
    assert (run.data.eval_size, run.data.train_on, run.data.shards) == (200, "all", 2)
    assert (run.training.local.steps, run.training.batch_size) == (200, 8)
    assert run.training.warmup_rounds == 0.25
    assert (run.evaluation.every, run.evaluation.on_trainers) == (1, "after")
    assert (run.checkpoint.every, run.checkpoint.keep) == (1, 10)
    assert run.averaging.min_peers == 2
    assert (peer.evaluate, peer.gradient_checkpointing) == (True, True)
    assert peer.output == Path(".logs/UnitedLLM")
    assert "# refused: model_args.load_pretrained: " in run_out.read_text()
    if path == SHIPPED:
        assert run.evaluation.max_rows == 20000


class RealTrainer(Peer):
    """The whole trainer, with a model and rows."""

    def take(self, seat):
        return prepare(seat)


@pytest.mark.parametrize("path", [DOCUMENT, SHIPPED], ids=lambda path: path.stem)
@pytest.mark.timeout(180)  # real training, perhaps beside other work
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_translated_run_starts_and_trains(tmp_path, path):
    """With a small model and rows of our own in place of the hub's, and shorter."""
    rows = tmp_path / "rows.jsonl"
    asked = ({"instruction": f"what is {n}?", "response": f"{n} is {n + 1}"} for n in range(40))
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    made = translate(read_unitedllm(path))
    training = {**made.run["training"], "local": {"steps": 12}}
    data = {**made.run["data"], "source": str(rows), "eval_size": 8}
    model = {"random_init": {}, "dtype": made.run["model"]["dtype"]}
    changed = {"name": "seed", "model": model, "data": data, "training": training, "rounds": 2}
    churn = Churn(tmp_path)
    run = RunConfig.model_validate({**made.run, **changed})
    churn.manifest = Manifest.found(run, Identity.ephemeral())
    churn.settings = {**made.peer, "device": "cpu"}
    churn.start("rank1", kind=RealTrainer)
    churn.settings = {**churn.settings, "evaluate": False}  # its rank is not among those named
    churn.start("rank2", kind=RealTrainer)
    peers = churn.play(patience=80)
    assert peers["rank1"].final.digest == peers["rank2"].final.digest
    for peer in peers.values():
        committed = peer.of(RoundCommitted)
        assert [len(e.peers) for e in committed] == [2, 2]
        assert all(e.samples == 96 for e in committed)
    assert [e.round for e in peers["rank1"].of(TrainerEvaluated)] == [1, 2]
    assert peers["rank2"].of(TrainerEvaluated) == []
    first, second = (e.loss for e in peers["rank1"].of(TrainerEvaluated))
    assert second < first


# ---- single keys


@pytest.mark.parametrize(
    ("key", "value", "others", "expected"),
    [
        ("local_num_train_epochs", 1, {"local_max_steps": 200}, None),
        ("local_num_train_epochs", 0.5, {"local_max_steps": -1}, {"training.local.epochs": 0.5}),
        ("local_max_steps", 0, {}, None),
        ("max_steps", 7, {}, {"training.local.steps": 7}),
        ("max_steps", 7, {"local_max_steps": 9}, None),
        ("save_frequency", None, {"frequency_of_the_test": 3}, {"checkpoint.every": 3}),
        ("save_frequency", -1, {}, {"checkpoint.every": 1}),
        ("save_frequency", 0, {}, {"checkpoint.every": 0}),
        ("save_frequency", 4, {"frequency_of_the_test": 3}, {"checkpoint.every": 4}),
        ("save_total_limit", None, {}, {"checkpoint.keep": None}),
        ("test_on_clients", False, {}, {"evaluation.on_trainers": "never"}),  # a plain no in YAML
        ("test_on_clients", "both", {}, {"evaluation.on_trainers": "both"}),
        ("warmup_ratio", 0.1, {"comm_round": 20}, {"training.warmup_rounds": 2.0}),
        ("extra_save_steps", [150, 200, 201], {"local_max_steps": 100}, {"checkpoint.at": [2, 3]}),
        ("model_dtype", "bf16", {}, {"model.dtype": "bfloat16"}),
        ("model_dtype", "float", {}, {"model.dtype": "float32"}),
        ("model_dtype", "fp32", {"bf16": True}, None),
        ("bf16", True, {"model_dtype": "fp32"}, {"model.dtype": "bfloat16"}),
        ("learning_rate", "3e-4", {}, {"training.learning_rate": 3e-4}),  # text for PyYAML
        ("gradient_accumulation_steps", 4, {}, {"training.batch_size": 32}),
        ("remove_long_seq", True, {"dataset_streaming": True}, None),
        ("truncate_long_seq", True, {"remove_long_seq": True}, None),
        ("response_template", "### Response:", {}, {"data.train_on": "answer"}),
        ("prompt_style", "llama", {}, {"data.template": "llama2"}),
        ("dataset_path", ["a.jsonl"], {"dataset_name": "x/y"}, None),
        ("dataset_path", "a.jsonl", {}, {"data.source": "a.jsonl"}),
        ("test_dataset_size", 200, {"dataset_path": ["a", "b"]}, None),
        ("test_dataset_size", 200, {"test_dataset_ratio": 0.1}, None),
        ("lora_on_all_modules", True, {}, {"lora.target": "all-linear"}),
        ("lora_target_modules", ["q"], {"lora_on_all_modules": True}, None),
        ("column_name_mapping", "YTogaW5zdHJ1Y3Rpb24=", {}, {"data.columns": {"a": "instruction"}}),
        ("defense_type", "cclip", {"enable_defense": True}, {"averaging.robust": "clip"}),
    ],
)
def test_a_key_means_what_it_meant(key, value, others, expected):
    judged = verdict(value, key, **others)
    if expected is None:
        assert judged.fate == "ignored"
    else:
        assert dict(judged.outcome.run) == expected


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("peft_type", "none", "only LoRA"),
        ("load_pretrained", False, "published weights are loaded instead"),
        ("enable_dp", True, "no differential privacy"),
        ("enable_fhe", True, "not encrypted"),
        ("warmup_steps", 50, "training.warmup_rounds"),
        ("federated_optimizer", "SA", "SA has no counterpart"),
        ("client_optimizer", "adafactor", "AdamW is used"),
        ("trust_remote_code", True, "nobody's code"),
        ("lora_target_modules", ".*(q|v)$", "regular expression"),
        ("column_name_mapping", "columns.yaml", "write the mapping"),
        ("learning_rate", "fast", "could not convert"),
        ("lora_r", 5000, "at most 1024"),
        ("frequency_of_the_test", 0, "every round is evaluated"),
        ("truncate_long_seq", False, "cut or dropped"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(key, value, why):
    judged = verdict(value, key)
    assert judged.fate == "refused"
    assert why in judged.outcome.reason


def test_private_files_of_the_clients_are_the_peers_with_placeholders():
    path = "~/rows-{rank}-of-{client_num_in_total}.jsonl"
    judged = verdict([path, "test.jsonl"], "client_dataset_path")
    assert judged.outcome.peer["data"] == ["~/rows-{shard}-of-{shards}.jsonl"]
    assert "second file" in judged.outcome.reason


def test_an_unknown_key_gets_the_nearest_one():
    judged = verdict(3, "comm_rounds")
    assert judged.fate == "unknown"
    assert "did you mean comm_round?" in judged.outcome.reason


def test_of_a_key_that_stands_twice_the_last_one_counts():
    made = translate({"a": {"seed": 1}, "b": {"seed": 2}})
    assert made.run["seed"] == 2
    assert made.verdicts[0].outcome.reason.startswith("b.seed stands further down")


def test_a_default_of_theirs_that_differs_from_ours_is_carried_over():
    made = translate({"model_args": {"model_name_or_path": "m"}})
    assert made.run["data"]["train_on"] == "all"
    assert made.run["training"]["learning_rate"] == 5e-5
    assert made.run["model"] == {"name": "m", "dtype": "float32"}


def test_secrets_are_neither_shown_nor_carried_over(tmp_path):
    out, peer = tmp_path / "x.yaml", tmp_path / "peer.yaml"
    words = ["config", "import-unitedllm", str(HIDDEN), "-o", str(out), "--peer-out", str(peer)]
    shown = RUNNER.invoke(app, words).output
    assert "auth_token: (not shown)" in shown
    for secret in ("hf_secret", "MQTT_PWD", "mlops_api_key: key"):
        assert secret not in shown + out.read_text() + peer.read_text()


def test_no_rule_leads_to_a_key_that_we_do_not_have():
    known = {*keys_of(RunConfig), *keys_of(PeerConfig)}
    values = (True, False, None, 0, 3, 0.5, "auto", "x", "lora", ["a"], {"a": "text"})
    for key in RULES:
        for value in values:
            judged = verdict(value, key, local_max_steps=100)
            if judged.fate == "mapped":
                assert {*judged.outcome.run, *judged.outcome.peer} <= known
            is_lacking = "unknown key" in judged.outcome.reason
            assert not is_lacking, (key, value, judged.outcome)


# ---- the command


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    result = RUNNER.invoke(app, ["config", "import-unitedllm", str(DOCUMENT), "-o", str(out)])
    assert isinstance(result.exception, ConfigExists)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [\n", "just text"])
def test_what_is_no_such_file_is_a_letter(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(ConfigUnreadable):
        read_unitedllm(path)
