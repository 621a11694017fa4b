import math

import numpy as np
import pytest
import torch

from p2pllm.training.evaluation import Evaluator
from p2pllm.training.generation import answer
from p2pllm.training.loss import counted, summed_loss


def some_values(adapter):
    draws = np.random.default_rng(0).standard_normal(adapter.size)
    return (0.3 * draws).astype(np.float32)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 6, 100])
def test_the_loss_does_not_depend_on_the_batches(tiny_adapter, rows, batch_size):
    result = Evaluator(tiny_adapter, rows, batch_size).evaluate(tiny_adapter.values())
    with torch.inference_mode():
        each = [float(summed_loss(tiny_adapter, [row])) for row in rows]
    assert result.loss == pytest.approx(sum(each) / counted(rows), rel=1e-5)
    assert (result.rows, result.tokens) == (6, counted(rows))
    assert result.seconds > 0


def test_evaluation_measures_the_given_values_and_leaves_the_others(tiny_adapter, rows):
    evaluator = Evaluator(tiny_adapter, rows, 4)
    own = tiny_adapter.values()
    other = evaluator.evaluate(some_values(tiny_adapter))
    assert np.array_equal(tiny_adapter.values(), own)
    assert other.loss != evaluator.evaluate(own).loss


def test_an_untrained_model_is_as_good_as_chance(tiny_adapter, rows):
    result = Evaluator(tiny_adapter, rows, 4).evaluate(tiny_adapter.values())
    assert result.loss == pytest.approx(math.log(258), rel=0.15)


def test_the_answer_of_the_base_is_that_without_the_adapter(tiny_adapter):
    prompt = list(b"what is this")
    base = answer(tiny_adapter, prompt, longest=8)  # B is zero at first
    tiny_adapter.adopt(some_values(tiny_adapter) * 10)
    assert answer(tiny_adapter, prompt, with_adapter=False, longest=8) == base
    assert answer(tiny_adapter, prompt, longest=8) != base
    assert len(answer(tiny_adapter, prompt, longest=3).encode("utf-8", "replace")) <= 9
