"""What tests share: a cache folder of their own, one thread, and a tiny untrained model."""

import asyncio
import inspect

import pytest

from p2pllm.swarm import virtual_time


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache that is empty at first and shared by the tests of one process."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("P2PLLM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_model():
    """Two layers, 64 wide, untrained: for tests of machinery, never of learning."""
    import torch

    from p2pllm.config.run import ModelConfig, RandomInit

    torch.set_num_threads(1)
    return ModelConfig(random_init=RandomInit(), dtype="float32")


@pytest.fixture
def tiny_base(tiny_model):
    """Loaded anew for each test, because PEFT changes a model in place."""
    from p2pllm.model.pretrained import load_base

    return load_base(tiny_model, seed=1, device="cpu")


@pytest.fixture
def tiny_adapter(tiny_base):
    from p2pllm.config.run import LoraConfig
    from p2pllm.model.adapter import attach_adapter

    return attach_adapter(tiny_base, LoraConfig(r=4, dropout=0.0), seed=1)


@pytest.fixture
def rows():
    """Six rows of different lengths; the first half of each is a question and does not count."""
    from p2pllm.data.tokens import IGNORED, Row

    texts = [
        "what is this",
        "a",
        "why not?",
        "no reason at all",
        "hello",
        "mostly harmless, so far",
    ]
    ids = [tuple(text.encode()) * 2 for text in texts]
    return [Row(i, (IGNORED,) * (len(i) // 2) + i[len(i) // 2 :]) for i in ids]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test that is a coroutine: in virtual time, or by the clock when it has real sockets."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    run = asyncio.run if pyfuncitem.get_closest_marker("swarm") else virtual_time.run
    run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
