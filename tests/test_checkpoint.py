import errno
import json
import os

import numpy as np
import peft
import pytest

from p2pllm import errors
from p2pllm.digest import digest_of
from p2pllm.model.pretrained import load_base
from p2pllm.training.checkpoint import Checkpoints

FINGERPRINT = "f" * 64
OURS = {"fingerprint": FINGERPRINT, "peers": ["ann", "bob"], "samples": 12, "evaluation": 3.1}


def values_of(adapter, round):
    return np.full(adapter.size, round, np.float32)


def save(checkpoints, adapter, *rounds, facts=OURS):
    return [checkpoints.save(n, adapter, values_of(adapter, n), facts) for n in rounds]


def newest(checkpoints):
    found = checkpoints.newest(FINGERPRINT)
    assert found is not None
    return found


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_found_again_with_its_facts(tiny_adapter, tmp_path):
    (path,) = save(Checkpoints(tmp_path, 3), tiny_adapter, 4)
    assert path == tmp_path / "checkpoints" / "round-4"
    found = newest(Checkpoints(tmp_path, 3))
    assert found.round == 4
    assert np.array_equal(found.values, values_of(tiny_adapter, 4))
    assert found.facts == {**OURS, "round": 4, "digest": digest_of(found.values)}
    assert json.loads((path / "round.json").read_text()) == found.facts


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_checkpoint_is_a_peft_folder(tiny_model, tiny_adapter, tmp_path):
    (path,) = save(Checkpoints(tmp_path, 3), tiny_adapter, 1)
    loaded = peft.PeftModel.from_pretrained(load_base(tiny_model, 1, "cpu").model, str(path))
    adapter = [p for n, p in loaded.named_parameters() if "lora_" in n]
    assert len(adapter) == len(tiny_adapter.parameters)
    assert all((p == 1).all() for p in adapter)


def test_spared_rounds_stay_beside_the_newest_and_all_stay_without_a_limit(tiny_adapter, tmp_path):
    save(Checkpoints(tmp_path, keep=1, spared=[2, 9]), tiny_adapter, 1, 2, 3, 4)
    assert names(tmp_path / "checkpoints") == ["round-2", "round-4"]
    save(Checkpoints(tmp_path, keep=None), tiny_adapter, 5, 6)
    assert names(tmp_path / "checkpoints") == ["round-2", "round-4", "round-5", "round-6"]


def test_only_the_newest_are_kept_and_latest_points_to_the_last(tiny_adapter, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, tiny_adapter, 8, 9, 10, 11)  # 9 < 10, though not as text
    assert names(tmp_path / "checkpoints") == ["round-10", "round-11"]
    assert str((tmp_path / "latest").readlink()) == "checkpoints/round-11"
    assert newest(checkpoints).round == 11


def test_the_final_adapter_is_kept_beside_the_rounds(tiny_adapter, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, tiny_adapter, 9)
    for _ in range(2):  # a second time replaces the first
        path = checkpoints.save_final(10, tiny_adapter, values_of(tiny_adapter, 10), OURS)
    assert path == tmp_path / "final"
    assert str((tmp_path / "latest").readlink()) == "final"
    assert names(tmp_path) == ["checkpoints", "final", "latest"]
    assert newest(checkpoints).round == 10


def test_nothing_is_found_in_a_new_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new", 3)
    checkpoints.check_owner(FINGERPRINT)
    assert checkpoints.newest(FINGERPRINT) is None
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "round.json"])
@pytest.mark.parametrize("harm", ["remove", "cut", "flip"])
def test_a_damaged_checkpoint_is_passed_over(tiny_adapter, tmp_path, file, harm):
    checkpoints = Checkpoints(tmp_path, 3)
    path = save(checkpoints, tiny_adapter, 1, 2)[-1] / file
    content = path.read_bytes()
    if harm == "remove":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-10] + b"#" + content[-9:])
    assert newest(checkpoints).round == 1


def test_another_runs_checkpoints_are_neither_used_nor_written_over(tiny_adapter, tmp_path):
    checkpoints = Checkpoints(tmp_path, 3)
    save(checkpoints, tiny_adapter, 1)
    checkpoints.check_owner(FINGERPRINT)
    assert checkpoints.newest("e" * 64) is None
    with pytest.raises(errors.ForeignFolder, match="e" * 64):
        checkpoints.check_owner("e" * 64)


def fail_after(monkeypatch, calls, code):
    """The `calls`-th flush to the disk, and all after it, fail with `code`."""
    counter = iter(range(10**6))
    real = os.fsync

    def fsync(handle):
        if next(counter) >= calls:
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_full_disk_leaves_the_last_good_checkpoint(tiny_adapter, tmp_path, monkeypatch, calls):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, tiny_adapter, 1)
    with monkeypatch.context() as patch:
        fail_after(patch, calls, errno.ENOSPC)
        with pytest.raises(errors.DiskFull, match="round-1") as caught:
            save(checkpoints, tiny_adapter, 2)
    assert str(tmp_path / "checkpoints") in caught.value.letter
    assert names(tmp_path / "checkpoints") == ["round-1"]
    assert newest(checkpoints).round == 1
    save(checkpoints, tiny_adapter, 2)
    assert newest(checkpoints).round == 2


def test_another_failure_of_the_disk_is_told_apart(tiny_adapter, tmp_path, monkeypatch):
    fail_after(monkeypatch, 0, errno.EIO)
    with pytest.raises(errors.CheckpointFailed, match="Input/output error"):
        save(Checkpoints(tmp_path, keep=1), tiny_adapter, 1)


def test_a_start_cleans_up_after_a_killed_process(tiny_adapter, tmp_path):
    checkpoints = Checkpoints(tmp_path, 3)
    save(checkpoints, tiny_adapter, 1)
    checkpoints.save_final(1, tiny_adapter, values_of(tiny_adapter, 1), OURS)
    (tmp_path / "checkpoints" / ".unfinished-round-2").mkdir()
    (tmp_path / ".unfinished-latest").symlink_to("nowhere")
    (tmp_path / "final").rename(tmp_path / ".earlier-final")  # killed while replacing it
    checkpoints = Checkpoints(tmp_path, 3)
    assert names(tmp_path) == ["checkpoints", "final", "latest"]
    assert names(tmp_path / "checkpoints") == ["round-1"]


def test_a_round_saved_again_replaces_the_first(tiny_adapter, tmp_path):
    checkpoints = Checkpoints(tmp_path, 3)
    save(checkpoints, tiny_adapter, 1)
    checkpoints.save(1, tiny_adapter, values_of(tiny_adapter, 7), OURS)
    assert names(tmp_path / "checkpoints") == ["round-1"]
    assert newest(checkpoints).values[0] == 7
