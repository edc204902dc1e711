"""The code of XFactors (arXiv 2601.21688), a residual and a subspace for each labelled factor, and its loss."""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax import losses


@dataclass(frozen=True)
class SubspaceLayout:
    """How a code is divided: a residual, and one block of coordinates for each factor.

    Attributes:
      residual_dim: Width of the residual code S.
      factor_dims: Widths of the blocks of the factor code T, in order; none leaves a plain autoencoder.

    Raises:
      ValueError: A width is too small, or there is no coordinate at all.
    """

    residual_dim: int
    factor_dims: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "factor_dims", tuple(self.factor_dims))
        if self.residual_dim < 0 or min(self.factor_dims, default=1) < 1 or not self.residual_dim + self.factor_dim:
            raise ValueError(
                "residual_dim, factor_dims: expected at least 0 and widths of at least 1, one of them above 0, got "
                f"{self.residual_dim} and {self.factor_dims}"
            )

    @property
    def factor_dim(self) -> int:
        """Width of the factor code T."""
        return sum(self.factor_dims)

    def slices(self) -> tuple[slice, ...]:
        """Returns the coordinates of each factor's block in T."""
        ends = itertools.accumulate(self.factor_dims, initial=0)
        return tuple(slice(*pair) for pair in itertools.pairwise(ends))

    def split(self, z_t: jax.Array) -> tuple[jax.Array, ...]:
        """Splits ``z_t [..., factor_dim]`` into its blocks; raises ValueError for another width."""
        self._check("z_t", z_t)
        return tuple(z_t[..., block] for block in self.slices())

    def swap(self, z_t_a: jax.Array, z_t_b: jax.Array, k: int) -> jax.Array:
        """Returns ``z_t_a [..., factor_dim]`` with the block of factor ``k`` taken from ``z_t_b``.

        Raises:
          ValueError: A width is another one, or there is no factor ``k``.
        """
        self._check("z_t_a", z_t_a)
        self._check("z_t_b", z_t_b)
        if not 0 <= k < len(self.factor_dims):
            raise ValueError(f"k: expected a factor from 0 to {len(self.factor_dims) - 1}, got {k}")
        blocks = list(self.split(z_t_a))
        blocks[k] = self.split(z_t_b)[k]
        return jnp.concatenate(blocks, axis=-1)

    def _check(self, name: str, z_t: jax.Array) -> None:
        if not z_t.ndim or z_t.shape[-1] != self.factor_dim:
            raise ValueError(
                f"{name}: expected [..., {self.factor_dim}], the sum of factor_dims {self.factor_dims}, got shape "
                f"{z_t.shape}"
            )


@dataclass(frozen=True)
class XFactorsConfig:
    """Weights of the loss; the defaults are those of the released runs.

    Attributes:
      temperature: Of the contrastive terms.
      nce_weight: Sum of the factors' weights: each has ``nce_weight / factors``.  0 leaves them out.
      kl_weight: Factor of both divergences.  It is small, as the reconstruction is a mean over pixels and a divergence
        a sum over dimensions.
      beta_s: Weight of the residual code's divergence, times ``kl_weight``.
      beta_t: Weight of the factor code's divergence, likewise.
      decorrelation: Weight of :func:`subspace_jax.losses.cross_correlation_penalty` of the two codes' means; 0 in the
        released runs.

    Raises:
      ValueError: The temperature is not positive, or a weight is negative.
    """

    temperature: float = 0.03
    nce_weight: float = 0.1
    kl_weight: float = 1e-6
    beta_s: float = 100.0
    beta_t: float = 1.0
    decorrelation: float = 0.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")
        for name in ("nce_weight", "kl_weight", "beta_s", "beta_t", "decorrelation"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")


class Codes(NamedTuple):
    """Gaussian codes of a batch.

    Attributes:
      mu_s: Means of the residual code ``[batch, residual_dim]``.
      logvar_s: Logarithms of its variances.
      mu_t: Means of the factor code ``[batch, factor_dim]``.
      logvar_t: Logarithms of its variances.
    """

    mu_s: jax.Array
    logvar_s: jax.Array
    mu_t: jax.Array
    logvar_t: jax.Array


class Outputs(NamedTuple):
    """What :func:`xfactors_loss` takes.

    Attributes:
      codes: The codes.
      z_t: A sample of the factor code.
      x_hat: The image decoded from samples of both codes.
    """

    codes: Codes
    z_t: jax.Array
    x_hat: jax.Array


def factor_infonce(z_t: jax.Array, labels: jax.Array, layout: SubspaceLayout, temperature: float) -> jax.Array:
    """The contrastive term of each factor: :func:`subspace_jax.losses.supervised_infonce` of its block and its labels.

    Of a sharded batch the negatives are those of all devices.

    Args:
      z_t: Samples of the factor code ``[batch, factor_dim]``.
      labels: Values of the factors ``[batch, factors]``, integers.
      layout: The layout.
      temperature: The temperature.

    Returns:
      ``[factors]`` in nats, float32 or wider.

    Raises:
      ValueError: Shapes do not match, or the temperature is not positive.
    """
    if labels.ndim != 2 or labels.shape != (z_t.shape[0], len(layout.factor_dims)):
        raise ValueError(
            f"labels: expected [batch, factors], here {(z_t.shape[0], len(layout.factor_dims))}, got {labels.shape}"
        )
    terms = [losses.supervised_infonce(block, labels[:, k], temperature) for k, block in enumerate(layout.split(z_t))]
    return jnp.stack(terms) if terms else jnp.zeros(0)


def xfactors_loss(
    outputs: Outputs, x: jax.Array, labels: jax.Array, layout: SubspaceLayout, config: XFactorsConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of XFactors.

    ``kl_weight (beta_s KL_s + beta_t KL_t) + mean (x_hat - x)^2 + nce_weight / K sum_k NCE_k``, and the decorrelation
    where it has a weight.  Without contrastive terms and factors it is that of a beta-VAE (Higgins et al., ICLR 2017).

    Args:
      outputs: Of the model for the batch.
      x: Images ``[batch, height, width, channels]`` in [0, 1].
      labels: Values of the factors ``[batch, factors]``, integers.
      layout: The layout.
      config: The weights.

    Returns:
      The loss, a scalar, and its terms: "reconstruction", "kl_s", "kl_t" and "nce [factors]" (of weight 1 each), and
      "decorrelation" where it has a weight.

    Raises:
      ValueError: Shapes do not match.
    """
    if outputs.x_hat.shape != x.shape:
        raise ValueError(f"x: expected images like the decoded ones {outputs.x_hat.shape}, got {x.shape}")
    codes = outputs.codes
    aux = {
        "reconstruction": jnp.mean(jnp.square(outputs.x_hat - x)),
        "kl_s": losses.gaussian_kl(codes.mu_s, codes.logvar_s),
        "kl_t": losses.gaussian_kl(codes.mu_t, codes.logvar_t),
        "nce": factor_infonce(outputs.z_t, labels, layout, config.temperature),
    }
    divergence = config.beta_s * aux["kl_s"] + config.beta_t * aux["kl_t"]
    loss = config.kl_weight * divergence + aux["reconstruction"]
    if config.nce_weight and layout.factor_dims:
        loss += config.nce_weight * jnp.mean(aux["nce"])
    if config.decorrelation:
        aux["decorrelation"] = losses.cross_correlation_penalty(codes.mu_s, codes.mu_t)
        loss += config.decorrelation * aux["decorrelation"]
    return loss, aux
