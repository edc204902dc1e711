"""Every task of the library and of the examples keeps the contract of :mod:`tests.train.task_battery`."""

import functools

import numpy as np
import pytest

from examples import fake_digits, low_rank_regression, rotated_digits, transfer
from subspace_jax import adapters, data, interop, language, nn, represent
from subspace_jax.data import text
from subspace_jax.interpret import intrinsic_dimension

from ..language.conftest import LLAMA
from .common import Regression, arrays, data_of
from .proving import coso, dsc, polysae
from .task_battery import TaskContract


@pytest.mark.slow
class TestRegression(TaskContract):
    deterministic = False

    def make(self):
        return Regression(), data_of(arrays(64), arrays(40, seed=1))


class TestClassifier(TaskContract):
    def make(self):
        made = data.union_of_subspaces(0, 8, 16, subspace_dim=2, num_train=128, num_test=72)
        make = functools.partial(
            represent.make_classifier, input_shape=(16,), num_classes=8, features=(16,), head="grassmann", dims=2
        )
        return represent.ClassifierTask(make), data_of(made.train, made.test, 32)


def packed_rows():
    texts = [text.Completion("p", "the quick brown fox " * (1 + i % 4)) for i in range(40)]
    return text.pack_rows(texts, text.ByteTokenizer(), 32)


@pytest.mark.slow
class TestCausalLM(TaskContract):
    def make(self):
        config = nn.CausalLMConfig.gpt2(259, 32, 2, 2, max_length=64)
        rows = packed_rows()
        rows["weights"] = np.ones_like(rows["weights"])  # so that all micro-batches weigh the same
        return language.CausalLMTask(config), data_of(rows, {name: x[:10] for name, x in rows.items()}, 8)


@pytest.mark.slow
class TestAdaptedLM(TaskContract):
    def make(self):
        with np.load(LLAMA / "io.npz") as io:
            tokens = np.tile(io["input_ids"].astype(np.int32), (8, 1))
        inputs = np.ascontiguousarray(tokens[:, :-1])
        rows = {
            "inputs": inputs,
            "labels": np.ascontiguousarray(tokens[:, 1:]),
            "weights": np.ones(inputs.shape, np.float32),
            "segment_ids": np.ones(inputs.shape, np.int32),
            "positions": np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape).copy(),
        }
        settings = {"attn/q": adapters.DoRA(2, 4.0, init="gaussian"), "mlp/up": adapters.LoRA(2, 4.0)}
        return language.AdaptedLMTask(interop.read_config(LLAMA), settings, folder=LLAMA), data_of(rows, rows, 8)


@pytest.mark.slow
class TestSubspace(TaskContract):
    deterministic = False

    def make(self):
        task, own = TestRegression().make()
        return intrinsic_dimension.SubspaceTask(task, 3), own


@pytest.mark.slow
class TestTransfer(TaskContract):
    def make(self):
        config = rotated_digits.default_config()
        settings = {"layer1": adapters.DoRA(4, 8.0), "layer2": adapters.SVFit(8), "head": adapters.Full()}
        images, labels = rotated_digits.digits(0)
        own = rotated_digits.labelled_data(images.reshape(-1, 64), labels, config.data)
        return transfer.TransferTask(rotated_digits.mlp, rotated_digits.mlp_init, settings), own


@pytest.mark.slow
class TestDetector(TaskContract):
    def make(self):
        rng = np.random.default_rng(0)
        inputs, kind = rng.standard_normal((100, 8, 8)), rng.integers(0, 6, 100)
        rows = {"inputs": inputs.astype(np.float32), "labels": np.int32(kind > 0), "kind": np.int32(kind)}
        return fake_digits.DetectorTask({"q": adapters.LoRA(2, 4.0), "head": adapters.Full()}, 1), data_of(rows, rows)


@pytest.mark.slow
class TestLowRankRegression(TaskContract):
    def make(self):
        rows = low_rank_regression.axis_scaled_regression(0)
        return low_rank_regression.LowRankRegressionTask(8, True, 1.0), data_of(rows, rows, 128)


@pytest.mark.slow
class TestSelfExpression(TaskContract):
    def make(self):
        phase = dsc.build().phases[1]
        return phase.task, phase.data


@pytest.mark.slow
class TestPolySAE(TaskContract):
    def make(self):
        phase = polysae.build(decoder=False).phases[1]
        return phase.task, phase.data


@pytest.mark.slow
class TestStream(TaskContract):
    def make(self):
        phase = coso.build().phases[0]
        return phase.task, phase.data
