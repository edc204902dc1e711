"""Detects fake digits: one kind of fake is seen in training, four others are in the test (arXiv 2411.15633).

A small vision transformer is pretrained to read digits, and adapted.  The area under the ROC curve on the unseen kinds
shows whether the detector has learnt what real digits have in common, rather than the traces of one kind of fake.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from scipy.fft import dctn, idctn
from scipy.stats import rankdata
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from examples.transfer import ClassificationTask, TransferTask, phases
from subspace_jax import losses, nn, train

KINDS = ("blur", "pca", "sampling", "dct", "mixture")
ATTENTION = ("q", "k", "v", "out")
WIDTH, BLOCKS, HEADS = 48, 3, 4
NUM_TRAIN, NUM_REAL = 1200, 600


def default_config() -> ConfigDict:
    """Returns the fields of a run: those of every run, and ``adapter`` of :func:`subspace_jax.train.default_adapter`.

    ``data.fake`` is the kind that is seen in training: "blur" (3 x 3 binomial), "pca" (15 components), "sampling"
    (halved and doubled), "dct" (low-pass) or "mixture" (drawn from a Gaussian mixture on 20 components).  The metric
    ``auc`` is the mean over the other four kinds, ``auc_seen`` that of this kind.  ``pretrain`` is that of the
    transformer, on the labels of the digits.  Weight decay is coupled with Adam, as in the released code.
    """
    config = train.default_config()
    config.task = "examples.fake_digits"
    config.train.best = "max:auc"
    config.train.epochs = 25.0
    config.data = ConfigDict({"fake": "blur", "batch_size": 64})
    config.pretrain = ConfigDict({"epochs": 40, "learning_rate": 1e-3})
    config.adapter = train.default_adapter()
    config.adapter.modules_to_save = "head,head/bias"
    config.optim.name = "adam"
    config.optim.schedule = "constant"
    config.optim.learning_rate = 2e-3
    config.optim.kwargs = {"weight_decay": 5e-4}
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Returns the run of a config, see :func:`subspace_jax.train.build`.

    Raises:
      ValueError: A field is invalid.
    """
    if config.data.fake not in KINDS:
        raise ValueError(f"data.fake: expected one of {KINDS}, got {config.data.fake!r}")
    settings = train.adapter_settings(config.adapter, ATTENTION)
    digits = load_digits()
    order = np.random.default_rng(config.seed).permutation(len(digits.target))
    images, labels = digits.images[order], digits.target[order].astype(np.int32)
    made, seen = fakes(images[:NUM_TRAIN], images, config.seed), KINDS.index(config.data.fake) + 1
    learn = _examples([images[:NUM_REAL], made[config.data.fake][:NUM_REAL]], [0, seen])
    test = _examples([images[NUM_TRAIN:], *(made[name][NUM_TRAIN:] for name in KINDS)], range(len(KINDS) + 1))
    read, held = (
        {"inputs": _scaled(images[part]), "labels": labels[part]} for part in (slice(NUM_TRAIN), slice(NUM_TRAIN, None))
    )
    size = {"batch_size": config.data.batch_size}
    sets = (
        train.array_data(read, evaluate={"eval": held}, **size),
        train.array_data(learn, evaluate={"eval": test}, **size),
    )
    tasks = ClassificationTask(transformer, digit_reader_init), DetectorTask(settings, seen)
    return train.Run(phases(*tasks, sets, config.pretrain))


class DetectorTask(TransferTask):
    """Detection of fakes by an adapted transformer, with areas under ROC curves.

    Args:
      settings: Adapters; see :func:`subspace_jax.adapters.prepare`.
      seen: Index of the kind that is seen in training, from 1.
    """

    def __init__(self, settings, seen: int):
        super().__init__(transformer, transformer_init, settings, renewed=("head",))
        self._seen = seen

    def evaluators(self):
        """Returns the evaluator of the test set."""
        return {"eval": DetectionEvaluator(self, self._seen)}


class DetectionEvaluator(train.Evaluator):
    """Mean loss, accuracy, and for each kind of fake the area under the ROC curve.

    Args:
      task: The task.
      seen: Index of the kind that is seen in training, from 1.
    """

    reduce = "rows"

    def __init__(self, task: TransferTask, seen: int):
        self._task, self._seen = task, seen
        kinds = ["seen" if kind == seen else name for kind, name in enumerate(KINDS, start=1)]
        self.metrics = ("loss", "accuracy", "auc", *(f"auc_{name}" for name in kinds))

    def collect(self, model, batch, *, key):
        """Returns score, loss and kind of each example."""
        logits = self._task.logits(*model, batch["inputs"])
        return {
            "score": logits[:, 1] - logits[:, 0],
            "loss": losses.cross_entropy(logits, batch["labels"]),
            "kind": batch["kind"],
        }

    def finish(self, eval):
        """Returns the metrics by name."""
        score, kind = np.asarray(eval["score"]), np.asarray(eval["kind"])
        areas = {
            f"auc_{'seen' if i == self._seen else name}": roc_auc(score[kind == i], score[kind == 0])
            for i, name in enumerate(KINDS, start=1)
        }
        unseen = [area for name, area in areas.items() if name != "auc_seen"]
        means = {"loss": np.mean(eval["loss"]), "accuracy": np.mean((score > 0) == (kind > 0)), "auc": np.mean(unseen)}
        return means | areas


def roc_auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Returns the area under the ROC curve: the probability that a positive score is above a negative one.

    Args:
      positive: ``[m]``, scores of positive examples.
      negative: ``[n]``, scores of negative examples; ties count one half.
    """
    m, n = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]))
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))


def fakes(train_images: np.ndarray, images: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Makes a fake of every image by each method, with grey levels rounded to integers as in real images.

    Args:
      train_images: ``[n, 8, 8]``, the images to which components and mixture are fitted.
      images: ``[m, 8, 8]``, 0 to 16.
      seed: Seed of the mixture and of its samples.

    Returns:
      Kind to images ``[m, 8, 8]``, integers from 0 to 16; those of "mixture" imitate no single image.
    """
    flat, known = images.reshape(len(images), -1), train_images.reshape(len(train_images), -1)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    pca, wide = (PCA(n, svd_solver="full").fit(known) for n in (15, 20))
    halved = images.reshape(-1, 4, 2, 4, 2).mean((2, 4))
    low = np.add.outer(np.arange(8), np.arange(8)) <= 6
    mixture = GaussianMixture(10, random_state=seed).fit(wide.transform(known))
    made = {
        "blur": (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4,
        "pca": pca.inverse_transform(pca.transform(flat)),
        "sampling": halved.repeat(2, axis=1).repeat(2, axis=2),
        "dct": idctn(dctn(images, axes=(1, 2), norm="ortho") * low, axes=(1, 2), norm="ortho"),
        "mixture": wide.inverse_transform(mixture.sample(len(images))[0]),
    }
    return {kind: np.clip(np.rint(x.reshape(images.shape)), 0, 16) for kind, x in made.items()}


def transformer_init(key: jax.Array) -> dict:
    """Draws a detector of two classes: three blocks of width 48 with four heads, 16 tokens of 2 x 2 pixels."""
    keys = iter(jax.random.split(key, 3 + 6 * BLOCKS))
    blocks = {
        f"block{i}": {
            "norm1": _norm_init(),
            **{name: _dense(next(keys), WIDTH, WIDTH) for name in ATTENTION},
            "norm2": _norm_init(),
            "up": _dense(next(keys), WIDTH, 4 * WIDTH),
            "down": _dense(next(keys), 4 * WIDTH, WIDTH),
        }
        for i in range(BLOCKS)
    }
    return {
        "embed": _dense(next(keys), 4, WIDTH),
        "position": 0.02 * jax.random.normal(next(keys), (16, WIDTH), jnp.float32),
        **blocks,
        "norm": _norm_init(),
        "head": _dense(next(keys), WIDTH, 2),
    }


def digit_reader_init(key: jax.Array) -> dict:
    """Draws the same transformer with a head of ten classes."""
    return {**transformer_init(key), "head": _dense(jax.random.fold_in(key, 1), WIDTH, 10)}


def transformer(params: dict, images: jax.Array) -> jax.Array:
    """Maps images ``[batch, 8, 8]`` to logits ``[batch, classes]``; kernels may be structured."""
    x = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
    x = nn.linear(x, **params["embed"])
    x = x + jnp.broadcast_to(params["position"], x.shape)
    for i in range(BLOCKS):
        block = params[f"block{i}"]
        h = _norm(x, block["norm1"])
        q, k, v = (nn.linear(h, **block[name]).reshape(*x.shape[:2], HEADS, -1) for name in ("q", "k", "v"))
        h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + nn.linear(h, **block["out"])
        h = jax.nn.gelu(nn.linear(_norm(x, block["norm2"]), **block["up"]))
        x = x + nn.linear(h, **block["down"])
    return nn.linear(jnp.mean(_norm(x, params["norm"]), axis=1), **params["head"])


def _dense(key, m, k):
    return {"kernel": jax.random.normal(key, (m, k), jnp.float32) / math.sqrt(m), "bias": jnp.zeros(k, jnp.float32)}


def _norm_init():
    return {"scale": jnp.ones(WIDTH, jnp.float32), "bias": jnp.zeros(WIDTH, jnp.float32)}


def _norm(x, params):
    x = (x - jnp.mean(x, -1, keepdims=True)) * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5)
    return x * jnp.broadcast_to(params["scale"], x.shape) + jnp.broadcast_to(params["bias"], x.shape)


def _scaled(images: np.ndarray) -> np.ndarray:
    return ((images - 8) / 8).astype(np.float32)


def _examples(parts, kinds) -> dict[str, np.ndarray]:
    kind = np.concatenate([np.full(len(x), k, np.int32) for x, k in zip(parts, kinds, strict=True)])
    return {"inputs": _scaled(np.concatenate(parts)), "labels": (kind > 0).astype(np.int32), "kind": kind}
