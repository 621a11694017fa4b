import json

import numpy as np
import peft
import pytest
import torch

from p2pllm import errors
from p2pllm.config.run import LoraConfig
from p2pllm.digest import digest_of
from p2pllm.model.adapter import adapter_values, attach_adapter
from p2pllm.model.pretrained import load_base


def some_values(adapter, seed=0):
    return np.random.default_rng(seed).standard_normal(adapter.size).astype(np.float32)


def logits(model):
    ids = torch.arange(60, 90).unsqueeze(0)
    with torch.inference_mode():
        return model(input_ids=ids).logits


def test_values_come_back_as_they_were_adopted(tiny_adapter):
    values = some_values(tiny_adapter)
    tiny_adapter.adopt(values)
    assert np.array_equal(tiny_adapter.values(), values)
    assert tiny_adapter.values().dtype == np.float32
    tiny_adapter.values()[:] = 0  # a copy
    assert np.array_equal(tiny_adapter.values(), values)


def test_the_order_is_that_of_the_names(tiny_adapter):
    names = list(tiny_adapter.shapes)
    assert names == sorted(names, key=lambda name: (".lora_B." in name, name))
    assert ".lora_A." in names[len(names) // 2 - 1] and ".lora_B." in names[len(names) // 2]
    assert tiny_adapter.size_of_a == 4 * 64 * 4  # four modules of width 64, rank 4
    assert names[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert tiny_adapter.size == sum(int(np.prod(s)) for s in tiny_adapter.shapes.values())


def test_values_of_another_length_are_refused(tiny_adapter):
    for wrong in (np.zeros(3, np.float32), np.zeros((1, tiny_adapter.size), np.float32)):
        with pytest.raises(errors.AdapterDiffers):
            tiny_adapter.adopt(wrong)


def test_first_values_are_the_same_on_every_machine(tiny_model, tiny_adapter):
    values = tiny_adapter.initial_values(1)
    assert np.array_equal(values, tiny_adapter.values())
    assert digest_of(values) == ("fdf9d3de6387bffb3aefd5217eefe8fb365b8daaaf6a00b9a944ae4dc5dfb10a")
    assert digest_of(tiny_adapter.initial_values(2)) != digest_of(values)
    parts = tiny_adapter.tensors(values)
    assert all(part.any() == (".lora_A." in name) for name, part in parts.items())
    assert all(abs(part).max() <= 64**-0.5 for part in parts.values())


def test_first_values_and_layout_do_not_depend_on_the_base_precision(tiny_model, tiny_adapter):
    model = tiny_model.model_copy(update={"dtype": "bfloat16"})
    other = attach_adapter(load_base(model, 1, "cpu"), LoraConfig(r=4, dropout=0.0), seed=1)
    assert other.layout_sha256 == tiny_adapter.layout_sha256
    assert np.array_equal(other.values(), tiny_adapter.values())
    assert all(p.dtype == torch.float32 for p in other.parameters.values())


def test_another_rank_is_another_layout(tiny_model, tiny_adapter):
    other = attach_adapter(load_base(tiny_model, 1, "cpu"), LoraConfig(r=8), seed=1)
    assert other.layout_sha256 != tiny_adapter.layout_sha256


def test_the_base_answers_as_before_while_the_adapter_is_disabled(tiny_model, tiny_adapter):
    base = logits(load_base(tiny_model, 1, "cpu").model)
    assert torch.equal(logits(tiny_adapter.model), base)  # B is zero at first
    tiny_adapter.adopt(some_values(tiny_adapter))
    assert not torch.allclose(logits(tiny_adapter.model), base)
    with tiny_adapter.disabled():
        assert torch.equal(logits(tiny_adapter.model), base)
    assert not torch.allclose(logits(tiny_adapter.model), base)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_saved_folder_is_a_peft_folder_with_the_same_answers(tiny_model, tiny_adapter, tmp_path):
    values = some_values(tiny_adapter)
    tiny_adapter.save(tmp_path, values)
    tiny_adapter.adopt(values)
    fresh = load_base(tiny_model, 1, "cpu")
    loaded = peft.PeftModel.from_pretrained(fresh.model, str(tmp_path))
    assert torch.equal(logits(loaded), logits(tiny_adapter.model))
    assert np.array_equal(adapter_values(tmp_path), values)


def test_a_saved_folder_names_the_base_model_as_the_run_does(tiny_adapter, tmp_path):
    tiny_adapter.save(tmp_path, tiny_adapter.values())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "random-init"
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["inference_mode"] is True
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_target_the_model_lacks_names_those_it_has(tiny_base):
    with pytest.raises(errors.LoraTargetMissing) as caught:
        attach_adapter(tiny_base, LoraConfig(target=("q_proj", "query_key_value")), seed=1)
    letter = caught.value.letter
    assert "lora.target names query_key_value" in letter
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in letter


def test_a_misspelt_target_gets_the_nearest_name(tiny_base):
    with pytest.raises(errors.LoraTargetMissing, match="Did you mean gate_proj"):
        attach_adapter(tiny_base, LoraConfig(target=("gate_prj", "q_proj")), seed=1)


def test_a_rank_that_peft_refuses_is_a_letter_that_names_the_key(tiny_base):
    unchecked = LoraConfig().model_copy(update={"r": -1})  # as if our own limits let it through
    with pytest.raises(errors.LoraRefused, match=r"-1(.|\n)*lora\.r is 1 or more"):
        attach_adapter(tiny_base, unchecked, seed=1)


def test_a_target_that_is_no_linear_layer_is_refused(tiny_base):
    with pytest.raises(errors.LoraTargetMissing, match="input_layernorm"):
        attach_adapter(tiny_base, LoraConfig(target=("input_layernorm",)), seed=1)


def test_all_linear_means_every_linear_layer_but_the_head(tiny_base):
    adapter = attach_adapter(tiny_base, LoraConfig(target="all-linear"), seed=1)
    assert {name.split(".")[-3] for name in adapter.shapes} == {
        f"{part}_proj" for part in ("down", "gate", "k", "o", "q", "up", "v")
    }


def test_settings_that_peft_refuses_come_as_a_letter(tiny_base, monkeypatch):
    known = peft.tuners.lora.model.LoraModel.target_module_mapping
    monkeypatch.delitem(known, "llama")  # as for an architecture that PEFT does not know
    with pytest.raises(errors.LoraRefused, match="q_proj"):
        attach_adapter(tiny_base, LoraConfig(), seed=1)
