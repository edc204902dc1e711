"""What LoRA and DoRA have in common: their two factors, scales that may differ between layers, norms and dropout.

The kernel ``[*window, in / groups, out]`` of a convolution is a matrix with ``window x in / groups`` rows here.  Its
``a`` is a convolution to the rank, and its ``b`` one by a window of one; with groups each sees its own part of the
rank, so that ``b [rank / groups, out]`` stands for a matrix of blocks.
"""

import math
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from subspace_jax import kernels, linalg
from subspace_jax.adapters.quantized import Int8Weight, dense_base, names_of

INITS = ("kaiming", "gaussian", "pissa", "pissa_randomized", "lora_ga")


def adapted(w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Forms ``w + scale * a @ b``, in float32, or in float64 if any argument is; w gets no gradient."""
    w = dense_base(w)
    dtype = linalg.working_dtype(w, a, b)
    update = jnp.matmul(a.astype(dtype), b.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    scale = jnp.asarray(scale, dtype)
    return jax.lax.stop_gradient(w).astype(dtype) + scale.reshape(*scale.shape, *(1,) * (w.ndim - scale.ndim)) * update


def remove(w: jax.Array, a: jax.Array, b: jax.Array, scale: float | tuple[float, ...]) -> jax.Array:
    """Forms ``w - scale * a @ b`` in the dtype of w."""
    return adapted(w, a, b, -jnp.asarray(scale, linalg.working_dtype(w, a, b))).astype(w.dtype)


def factor_axes(names: P, window: int) -> dict[str, P]:
    """Logical axes of ``a`` and ``b`` for a weight with these.

    The rank has a name too: of a weight that is split along one side only, the factor of the other side would be whole
    on every device, and so would its moments.
    """
    return {"a": P(*names[:-1], "rank"), "b": P(*names[: len(names) - 2 - window], "rank", names[-1])}


def scale_fields(scale: float | tuple[float, ...], base: jax.Array | P) -> dict:
    """Fields of a structured weight for a scale: an array where layers differ, and its axes for a base of axes."""
    if isinstance(scale, tuple):
        names = names_of(base)
        scales = jnp.asarray(scale, linalg.working_dtype(base)) if names is None else P(*names[:-2])
        return {"scales": scales, "scale": 0.0}
    return {"scale": scale}


def dropout_fields(rate: float, key: jax.Array | None, base: jax.Array | P, window: int) -> dict:
    """Fields of a structured weight for dropout: a key for each stacked weight, or its axes; none without a key."""
    if key is None or not rate:
        return {}
    names = names_of(base)
    if names is not None:
        return {"key": P(*names[: len(names) - 2 - window]), "dropout": rate}
    lead = base.shape[: base.ndim - 2 - window]
    return {"key": jax.random.split(key, lead) if lead else key, "dropout": rate}


def dropped(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """Zeroes a share of the entries and scales the others up; without a key, x as it is."""
    if key is None:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x * jnp.asarray(1 / (1 - rate), x.dtype), 0)


def flat(w: jax.Array | Int8Weight, window: int) -> jax.Array | Int8Weight:
    """A kernel ``[..., *window, in, out]`` as a matrix ``[..., rows, out]``."""
    if not window:
        return w
    if isinstance(w, Int8Weight):
        return Int8Weight(w.scale, flat(w.values, window))
    return w.reshape(*w.shape[: w.ndim - 2 - window], -1, w.shape[-1])


def blocks(b: jax.Array, groups: int) -> jax.Array:
    """The matrix ``[..., rank, out]`` that ``b [..., rank / groups, out]`` stands for."""
    if groups == 1:
        return b
    *lead, rank, out = b.shape
    apart = b.reshape(*lead, rank, groups, out // groups)
    return jnp.einsum("...jho,gh->...gjho", apart, jnp.eye(groups, dtype=b.dtype)).reshape(*lead, -1, out)


def mix(x: jax.Array, b: jax.Array, groups: int) -> jax.Array:
    """Multiplies channels ``[..., rank]`` by ``b [rank / groups, out]``, each group's by its own columns."""
    b = b.astype(x.dtype)
    if groups == 1:
        return jnp.matmul(x, b)
    rank, out = b.shape
    apart = x.reshape(*x.shape[:-1], groups, rank)
    y = jnp.einsum("...gj,jgo->...go", apart, b.reshape(rank, groups, out // groups))
    return y.reshape(*x.shape[:-1], out)


def column_norm(w: jax.Array | Int8Weight, a: jax.Array, b: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Norms ``[..., out]`` of the columns of ``w + scale * a @ b``, of stacked weights one at a time.

    So a scan over layers has them bit by bit the same.
    """
    if jnp.ndim(scale):
        return jax.lax.map(lambda xs: column_norm(*xs), (w, a, b, scale))
    if w.ndim > 2:
        return jax.lax.map(lambda xs: column_norm(*xs, scale), (w, a, b))
    if isinstance(w, Int8Weight):
        return _quantized_norm(w, a, b, scale)
    return kernels.dora_weight_norm(w, a, b, scale)


def gain(magnitude: jax.Array, norm: jax.Array, detach_norm: bool, dtype: jnp.dtype) -> jax.Array:
    """``magnitude / norm``, the norm bounded below as the type of the weight asks."""
    norm = jax.lax.stop_gradient(norm) if detach_norm else norm
    return magnitude.astype(norm.dtype) / jnp.maximum(norm, kernels.least_norm(dtype))


def _quantized_norm(w, a, b, scale):
    """The factored sum of arXiv 2603.22276, from integers: the weight is not formed.

    There is no way out of cancellation here: a quantised weight carries an error of its own, of which the square is
    larger than what cancels unless the update is the weight's negative to within a percent.
    """
    full = jax.lax.Precision.HIGHEST
    wide = w.values.astype(w.dtype)
    a, b, scale = a.astype(w.dtype), b.astype(w.dtype), jnp.asarray(scale, w.dtype)
    energy = jnp.sum(jnp.square(wide), axis=0) * jnp.square(w.scale)
    cross = jnp.matmul(a.T, wide, precision=full) * w.scale[None]
    own = jnp.matmul(jnp.matmul(a.T, a, precision=full), b, precision=full)
    total = (energy + 2 * scale * jnp.sum(b * cross, axis=0)) + jnp.square(scale) * jnp.sum(b * own, axis=0)
    # The root of zero has no slope.
    positive = total > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1)), 0)


def scale_of(rank, alpha, rslora: bool) -> float | tuple[float, ...]:
    """The scale for a rank and an alpha, either of which may be a tuple over layers."""
    if not isinstance(rank, tuple) and not isinstance(alpha, tuple):
        return alpha / (math.sqrt(rank) if rslora else rank)
    layers = len(rank if isinstance(rank, tuple) else alpha)
    ranks = rank if isinstance(rank, tuple) else (rank,) * layers
    alphas = alpha if isinstance(alpha, tuple) else (alpha,) * layers
    scales = tuple(0.0 if r == 0 else a / (math.sqrt(r) if rslora else r) for r, a in zip(ranks, alphas, strict=True))
    return scales[0] if len(set(scales)) == 1 else scales


def check_rank_alpha(rank, alpha) -> None:
    """Raises unless rank and alpha are positive numbers, or tuples of one length."""
    ranks = rank if isinstance(rank, tuple) else (rank,)
    integers = all(isinstance(r, int) and not isinstance(r, bool) for r in ranks)
    if not integers or min(ranks, default=0) < 0 or not any(ranks):
        raise ValueError(f"rank: expected an integer of at least 1, or a tuple of them, got {rank!r}")
    if not isinstance(rank, tuple) and rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    alphas = alpha if isinstance(alpha, tuple) else (alpha,)
    if not alphas or not all(isinstance(a, int | float) and math.isfinite(a) and a > 0 for a in alphas):
        raise ValueError(f"alpha: expected a positive number, or a tuple of them, got {alpha!r}")
    if isinstance(rank, tuple) and isinstance(alpha, tuple) and len(rank) != len(alpha):
        raise ValueError(f"rank, alpha: expected one of each for every layer, got {len(rank)} and {len(alpha)}")


def check_setting(setting) -> None:
    """Raises unless the fields that LoRA and DoRA share are in range."""
    check_rank_alpha(setting.rank, setting.alpha)
    if setting.init not in INITS:
        raise ValueError(f"init: expected one of {INITS}, got {setting.init!r}")
    by_layer = isinstance(setting.rank, tuple) or isinstance(setting.alpha, tuple)
    if isinstance(setting.rank, tuple) and not keeps_base(setting):
        raise ValueError(f"init: {setting.init!r} takes one rank for all layers, got {setting.rank}")
    if not (isinstance(setting.dropout, float | int) and 0 <= setting.dropout < 1):
        raise ValueError(f"dropout: expected a share in [0, 1), got {setting.dropout!r}")
    if setting.window not in (0, 1, 2, 3) or (setting.window and by_layer):
        raise ValueError(f"window: expected 0 to 3 axes, and one rank and alpha with any, got {setting}")
    if not isinstance(setting.groups, int) or setting.groups < 1 or (setting.groups > 1 and not setting.window):
        raise ValueError(f"groups: expected at least 1, and more for convolutions only, got {setting.groups!r}")
    if setting.groups > 1 and (setting.rank % setting.groups or not keeps_base(setting)):
        raise ValueError(f"groups: expected to divide the rank, and no {setting.init!r}, got {setting}")


def keeps_base(setting) -> bool:
    """Whether the start leaves the frozen weight as it is."""
    return setting.init in ("kaiming", "gaussian")


def start_adapter(key: jax.Array, w: jax.Array, table: bool, setting, gradient: jax.Array | None):
    """Draws ``a`` and ``b`` for a matrix, a table or a convolution; returns the frozen part with them."""
    window, groups = setting.window, setting.groups
    if w.ndim < 2 + window or w.shape[-1] % groups:
        raise ValueError(f"window, groups: a weight {w.shape} is no kernel with a window of {window} axes, {groups=}")
    if isinstance(w, Int8Weight) and not keeps_base(setting):
        raise TypeError(f"init: {setting.init!r} takes part of the weight away; quantise what remains instead")
    gradient = None if gradient is None else flat(gradient, window)
    base, arrays = start_factors(key, flat(w, window), table, setting, gradient)
    if window:
        # Zeros, if there are groups.
        arrays["b"] = arrays["b"][..., : setting.rank // groups, :]
        arrays["a"] = arrays["a"].reshape(*w.shape[:-1], -1)
        base = w if keeps_base(setting) else base.reshape(w.shape)
    return base, arrays


def lora_ga_factors(
    gradient: jax.Array, rank: int, *, gamma: float = 16.0, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Factors whose first step comes nearest to that of the full weight: LoRA-GA.

    With ``u s vt`` the gradient's singular value decomposition, ``a = c u[:, :r]`` and ``b = c vt[r:2r]`` where
    ``c = out^(1/4) / sqrt(gamma)``.  The product is to be taken from the frozen weight, ``W - s a b``.

    Source: arXiv 2407.05000 ("ArB2r", stable scale), with the weights transposed.

    Args:
      gradient: Of the weight over some batches, ``[..., in, out]``.
      rank: The rank r; ``2 r`` is at most the smaller side.
      gamma: Larger is smaller factors.
      key: For a random sketch of ``4 r`` columns, which large gradients need; exact without.

    Returns:
      ``a [..., in, r]`` and ``b [..., r, out]``.

    Raises:
      ValueError: The rank is too large, or gamma is not positive.
    """
    least = min(gradient.shape[-2:])
    if not 1 <= rank <= least // 2:
        raise ValueError(f"rank: LoRA-GA takes twice the rank of triplets, {least} there are; got {rank}")
    if not gamma > 0:
        raise ValueError(f"gamma: expected a positive number, got {gamma}")
    full = gradient.astype(linalg.working_dtype(gradient))
    if key is None or 4 * rank >= least:
        u, _, vt = linalg.canonical_svd(full)
    else:
        u, _, vt = linalg.randomized_svd(key, full, 2 * rank, oversample=2 * rank, power_steps=4)
    size = gradient.shape[-1] ** 0.25 / math.sqrt(gamma)
    return size * u[..., :rank], size * vt[..., rank : 2 * rank, :]


def start_factors(key: jax.Array, w: jax.Array, table: bool, setting, gradient: jax.Array | None):
    """Draws ``a`` and ``b``; the frozen part is w, less their product for PiSSA and LoRA-GA."""
    *lead, rows, columns = w.shape
    ranks, width = setting.rank, max(setting.rank) if isinstance(setting.rank, tuple) else setting.rank
    for name, given in (("rank", setting.rank), ("alpha", setting.alpha)):
        if isinstance(given, tuple) and (len(lead) != 1 or len(given) != lead[0]):
            raise ValueError(f"{name}: {len(given)} for the layers of a weight {w.shape}")
    if width > min(rows, columns):
        warnings.warn(f"rank {width} exceeds the {min(rows, columns)} of a weight {w.shape}", stacklevel=4)
    dtype = linalg.working_dtype(w)
    if keeps_base(setting):
        used = jnp.arange(width)[None] < jnp.reshape(jnp.asarray(ranks), (-1, 1))
        used = used.astype(dtype).reshape(*(lead if isinstance(ranks, tuple) else [1] * len(lead)), 1, width)
        if table:
            b = jax.random.normal(key, (*lead, width, columns), dtype)
            return w, {"a": jnp.zeros((*lead, rows, width), dtype), "b": b * jnp.swapaxes(used, -1, -2)}
        if setting.init == "kaiming":
            bound = 1 / math.sqrt(rows)
            a = jax.random.uniform(key, (*lead, rows, width), dtype, -bound, bound)
        else:
            a = jax.random.normal(key, (*lead, rows, width), dtype) / jnp.maximum(jnp.sum(used, -1, keepdims=True), 1)
        return w, {"a": a * used, "b": jnp.zeros((*lead, width, columns), dtype)}
    if setting.init.startswith("pissa") and width > min(rows, columns):
        raise ValueError(f"rank: PiSSA has at most {min(rows, columns)} triplets of a weight {w.shape}, got {width}")
    scale = setting.scale
    if isinstance(scale, tuple):
        raise ValueError(f"alpha: {setting.init!r} takes one for all layers, got {setting.alpha}")
    if setting.init == "lora_ga":
        if gradient is None or gradient.shape != w.shape:
            got = None if gradient is None else gradient.shape
            raise ValueError(f"gradients: LoRA-GA needs that of each weight, for {w.shape} got {got}")
        a, b = lora_ga_factors(gradient.astype(dtype), width, key=key)
        return remove(w, a, b, scale), {"a": a, "b": b}
    full = w.astype(dtype)
    if setting.init == "pissa":
        u, s, vt = linalg.canonical_svd(full)
        u, s, vt = u[..., :width], s[..., :width], vt[..., :width, :]
    else:
        u, s, vt = linalg.randomized_svd(key, full, width, oversample=16, power_steps=4)
    root = jnp.sqrt(s / scale)
    a, b = u * root[..., None, :], root[..., :, None] * vt
    return remove(w, a, b, scale), {"a": a, "b": b}
