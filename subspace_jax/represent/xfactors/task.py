"""XFactors as a task of the train loop (arXiv 2601.21688)."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from subspace_jax import losses, train
from subspace_jax.represent.xfactors.core import Codes, SubspaceLayout, XFactorsConfig, xfactors_loss
from subspace_jax.represent.xfactors.data import FactorImages, held_out, open_factor_images
from subspace_jax.represent.xfactors.evaluate import FactorScores
from subspace_jax.represent.xfactors.model import XFactors, decode, encode, make_xfactors


class XFactorsTask(train.Task):
    """Learns an autoencoder with a subspace for each labelled factor, as a :class:`subspace_jax.train.Task`.

    Batches hold ``inputs [batch, height, width, channels]``, float32 in [0, 1], ``factors [batch, factors]`` int32
    and, for evaluation, ``mask [batch]``.  The loss compares each example with all others, so that a batch is not
    divided into micro-batches; where it is sharded, examples of all devices are compared.

    Args:
      make: Builds the module from a key.
      targets: Column of ``factors`` that supervises each block of the factor code.
      config: Weights of the loss.
      factor_names: Names of all columns; with them the codes of the sets "train" and "eval" are scored at the end, see
        :class:`~subspace_jax.represent.xfactors.evaluate.FactorScores`.
      shift: The most pixels by which a training image is shifted, at random, its edges repeated.

    Raises:
      ValueError: There is not one target for each block.
    """

    splittable = False

    def __init__(
        self,
        make: Callable[[jax.Array], XFactors],
        targets: Sequence[int],
        config: XFactorsConfig,
        *,
        factor_names: Sequence[str] = (),
        shift: int = 0,
    ):
        self._make, self._config, self._shift = make, config, shift
        self._graph, self._axes = train.split_module(make)
        self.targets, self.factor_names = tuple(targets), tuple(factor_names)
        self.layout: SubspaceLayout = nnx.eval_shape(make, jax.random.key(0)).layout
        if len(self.targets) != len(self.layout.factor_dims):
            raise ValueError(
                f"targets: expected one factor for each of the blocks {self.layout.factor_dims}, got {self.targets}"
            )

    def init(self, key):
        """Returns fresh parameters, and the running statistics of networks that have them."""
        return train.module_arrays(self._make(key))

    def axes(self):
        """Returns the logical axis names of parameters and variables."""
        return self._axes

    def module(self, params, variables) -> XFactors:
        """Returns the module with these arrays, in evaluation mode."""
        model = nnx.merge(self._graph, params, variables)
        model.eval()
        return model

    def codes(self, params, variables, inputs: jax.Array) -> Codes:
        """Returns the codes of images ``[batch, height, width, channels]``."""
        return encode(self.module(params, variables), inputs)

    def loss(self, params, variables, batch, *, key, step):
        """Returns the loss of sampled codes, and its terms as metrics, those of factors as ``nce_K``."""
        del step
        of_shift, of_codes = jax.random.split(key)
        x = batch["inputs"]
        if self._shift:
            x = _shifted(of_shift, x, self._shift)
        model = self.module(params, variables)
        model.train()
        labels = batch["factors"][:, np.asarray(self.targets, np.int32)]
        loss, aux = xfactors_loss(model(x, of_codes), x, labels, self.layout, self._config)
        nce = aux.pop("nce")
        aux |= {f"nce_{k}": nce[i] for i, k in enumerate(self.targets)}
        return loss, (train.module_arrays(model)[1], aux)

    def evaluate(self, params, variables, batch, *, key):
        """Returns sums over examples of the squared error of images decoded from means, and of the divergences."""
        del key
        x, real = batch["inputs"], batch["mask"] > 0
        model = self.module(params, variables)
        codes = encode(model, x)
        errors = jnp.mean(jnp.square(decode(model, codes.mu_s, codes.mu_t) - x), axis=(1, 2, 3))
        of_each = jax.vmap(lambda mu, logvar: losses.gaussian_kl(mu[None], logvar[None]))
        return {
            "mse": jnp.sum(errors, where=real),
            "kl_s": jnp.sum(of_each(codes.mu_s, codes.logvar_s), where=real),
            "kl_t": jnp.sum(of_each(codes.mu_t, codes.logvar_t), where=real),
            "count": jnp.sum(real.astype(jnp.float32)),
        }

    def evaluators(self):
        """Returns the errors over "eval" and, with names of the factors, the scores at the end."""
        scores = {"factors": FactorScores(self)} if self.factor_names else {}
        return {**super().evaluators(), **scores}


def _shifted(key: jax.Array, images: jax.Array, most: int) -> jax.Array:
    """Shifts each image by up to so many pixels."""
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    starts = jax.random.randint(key, (images.shape[0], 2), 0, 2 * most + 1)

    def window(image, start):
        return jax.lax.dynamic_slice(image, (start[0], start[1], jnp.zeros_like(start[0])), images.shape[1:])

    return jax.vmap(window)(padded, starts)


def default_config() -> ConfigDict:
    """Returns the fields of a run.

    ``data.name`` is "sprites" or "openmoji" (of ``data.size`` pixels); ``data.targets`` are the names of the labelled
    factors, one for each of ``model.factor_dims``; ``data.shift`` shifts training images by up to so many pixels.
    ``model.network`` is "mlp", with hidden layers of ``model.widths``, or "conv", with three stages of these channels.
    ``loss`` has the fields of :class:`XFactorsConfig`.
    """
    config = train.default_config()
    config.task = "subspace_jax.represent.xfactors.task"
    config.train.best = "min:mse"
    config.data = ConfigDict(
        {
            "name": "sprites",
            "size": 48,
            "targets": ("shape", "x", "y"),
            "test_share": 0.25,
            "shift": 0,
            "batch_size": 128,
            "eval_batch_size": 256,
        }
    )
    config.model = ConfigDict(
        {"network": "mlp", "widths": (256, 256, 256), "residual_dim": 4, "factor_dims": (2, 2, 2)}
    )
    config.loss = ConfigDict(asdict(XFactorsConfig()))
    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "constant"
    config.optim.clip_norm = 3.0
    config.optim.kwargs = {"weight_decay": 0.01}
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Makes the run of a config, as :func:`subspace_jax.train.build` asks for it.

    Raises:
      ValueError: A field can't serve.
      ImportError: "openmoji" needs packages that are not installed.
    """
    sizes, model = config.data, config.model
    try:
        weights = XFactorsConfig(**config.loss)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss.{error}") from error
    try:
        layout = SubspaceLayout(model.residual_dim, tuple(model.factor_dims))
    except ValueError as error:
        raise ValueError(f"model.{error}") from error
    if len(sizes.targets) != len(layout.factor_dims):
        raise ValueError(
            f"data.targets: expected a factor for each of model.factor_dims {layout.factor_dims}, got {sizes.targets}"
        )
    if not 0 <= sizes.shift < sizes.size:
        raise ValueError(f"data.shift: expected 0 to {sizes.size - 1} pixels, got {sizes.shift}")
    found = open_factor_images(sizes.name, sizes.size)
    targets = [found.index("data.targets", name) for name in sizes.targets]
    train_set, test_set = held_out(found, sizes.test_share, config.seed)
    make = functools.partial(
        make_xfactors,
        layout=layout,
        image_shape=found.images.shape[1:],
        network=model.network,
        widths=tuple(model.widths),
    )
    try:
        task = XFactorsTask(make, targets, weights, factor_names=found.names, shift=sizes.shift)
    except ValueError as error:
        raise ValueError(f"model.{error}") from error
    sets = {"evaluate": {"eval": test_set, "train": train_set}, "eval_batch_size": sizes.eval_batch_size}
    examples = train.array_data(train_set, batch_size=sizes.batch_size, **sets)
    return train.Run((train.Phase("train", task, examples),))


def images_of(config: ConfigDict) -> tuple[FactorImages, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the pictures of a run's config, and its training and test sets."""
    found = open_factor_images(config.data.name, config.data.size)
    return found, *held_out(found, config.data.test_share, config.seed)
