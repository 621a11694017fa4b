"""Identities, manifests, records: what is signed cannot be forged, moved, changed or replayed."""

import stat
import subprocess
import sys

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.config.run import DataConfig, ModelConfig, RunConfig
from p2pllm.errors import IdentityInUse, IdentityUnreadable
from p2pllm.swarm.identity import Identity, is_signed_by
from p2pllm.swarm.manifest import Manifest
from p2pllm.swarm.records import (
    RUNS_KEY,
    Progress,
    Results,
    is_acceptable,
    progress_key,
    read,
    seal,
)

OWNER, OTHER = Identity.ephemeral(), Identity.ephemeral()
RUN = RunConfig(name="demo", model=ModelConfig(name="x"), data=DataConfig(source="y"))
KEY = progress_key("demo-1")


def progress(identity=OWNER):
    return Progress(peer=identity.peer_id, name="ann", role="trainer", state="ready", round=2)


def test_a_manifest_survives_the_way_through_the_swarm():
    manifest = Manifest.found(RUN, OWNER)
    again = Manifest.unpack(manifest.pack())
    assert again is not None
    assert again.run == RUN
    assert again.run_id == manifest.run_id
    assert again.run_id.startswith("demo-")


def test_the_run_id_names_one_owner_and_one_configuration():
    ids = {
        Manifest.found(RUN, OWNER).run_id,
        Manifest.found(RUN, OTHER).run_id,
        Manifest.found(RUN.model_copy(update={"rounds": 99}), OWNER).run_id,
    }
    assert len(ids) == 3


def test_a_tampered_manifest_is_none():
    fields = msgpack.unpackb(Manifest.found(RUN, OWNER).pack())
    fields["run"] = fields["run"].replace(b'"rounds": 10', b'"rounds": 11')
    assert Manifest.unpack(msgpack.packb(fields)) is None


def test_a_manifest_signed_by_somebody_else_is_not_stored_under_the_run():
    ours, forged = Manifest.found(RUN, OWNER), Manifest.found(RUN, OTHER)
    assert is_acceptable(RUNS_KEY, ours.run_id, ours.pack(), 1e12)
    assert not is_acceptable(RUNS_KEY, ours.run_id, forged.pack(), 1e12)


@given(st.binary(max_size=300))
def test_hostile_bytes_are_refused_and_never_raise(data):
    assert Manifest.unpack(data) is None
    assert not is_acceptable(KEY, OWNER.peer_id, data, 1.0)
    assert not is_acceptable(RUNS_KEY, "demo-1", data, 1.0)
    assert not is_signed_by(OWNER.peer_id, data, data)


def test_a_record_reads_back():
    data = seal(OWNER, KEY, OWNER.peer_id, progress(), 100.0)
    assert read(Progress, OWNER.peer_id, KEY, OWNER.peer_id, data) == progress()
    assert is_acceptable(KEY, OWNER.peer_id, data, 100.0)


def test_nobody_writes_in_another_name():
    forged = seal(OTHER, KEY, OWNER.peer_id, progress(), 100.0)
    assert not is_acceptable(KEY, OWNER.peer_id, forged, 100.0)
    assert read(Progress, OWNER.peer_id, KEY, OWNER.peer_id, forged) is None


def test_a_record_cannot_be_moved_to_another_run_or_live_longer_than_signed():
    data = seal(OWNER, KEY, OWNER.peer_id, progress(), 100.0)
    assert not is_acceptable(progress_key("demo-2"), OWNER.peer_id, data, 100.0)
    assert not is_acceptable(KEY, OWNER.peer_id, data, 200.0)


def test_a_record_of_the_wrong_form_is_none():
    data = seal(OWNER, KEY, OWNER.peer_id, Results(results=[]), 100.0)
    assert read(Progress, OWNER.peer_id, KEY, OWNER.peer_id, data) is None


def test_an_identity_is_made_once_and_readable_by_its_owner_only(tmp_path):
    path = tmp_path / "deep" / "identity.key"
    first = Identity.open(path)
    first.release()
    assert Identity.open(path).peer_id == first.peer_id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["identity.key"]


def test_an_identity_in_use_by_a_live_process_is_refused(tmp_path):
    path = tmp_path / "identity.key"
    code = (
        "import sys, pathlib; from p2pllm.swarm.identity import Identity;"
        "i = Identity.open(pathlib.Path(sys.argv[1])); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(IdentityInUse, match="--name"):
            Identity.open(path)
        other.communicate("\n", timeout=10)
    Identity.open(path).release()


def test_a_file_that_is_no_key_is_a_letter(tmp_path):
    path = tmp_path / "identity.key"
    path.write_text("not a key")
    with pytest.raises(IdentityUnreadable, match="--identity"):
        Identity.open(path)
