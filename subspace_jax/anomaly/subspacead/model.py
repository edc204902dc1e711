"""SubspaceAD: fitted to a few normal images, scores others and their pixels."""

import functools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from subspace_jax import data, kernels, linalg, train
from subspace_jax.anomaly.subspacead.core import (
    METHODS,
    Moments,
    PCASubspace,
    init_moments,
    merge_moments,
    padded_columns,
    residual_score,
    solved_subspace,
    update_moments,
)
from subspace_jax.anomaly.subspacead.maps import (
    AGGREGATIONS,
    anomaly_map,
    background_mask,
    image_scores,
    merge_tiles,
    tile_origins,
)

PyTree = Any
_LARGEST_ANGLE = 345.0
_IN_FLIGHT = 2


class Backbone(Protocol):
    """What computes features of patches: :class:`PixelPatches` or :class:`VisionPatches`; hashable."""

    @property
    def side(self) -> int:
        """Side of the images."""

    @property
    def width(self) -> int:
        """Width of the features."""

    def features(self, params: PyTree, images: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Features ``[batch, h, w, width]`` of images uint8 ``[batch, side, side, 3]``, and saliency or None."""


@dataclass(frozen=True)
class SubspaceADSettings:
    """How normal images are augmented and features scored; the defaults are those of arXiv 2602.23013's code.

    Attributes:
      explained_variance: Share of the variance that the subspace has, in (0, 1].
      rank: Its rank instead; None for the share.
      method: "reconstruction", "mahalanobis", "euclidean" or "cosine", see :func:`residual_score`.
      drop_leading: Leading directions that count as outside the subspace.
      rotations: Randomly rotated copies of each normal image that are fitted to beside it; 0 for none, as for objects
        whose orientation matters.
      aggregate: Score of an image from its map, see :func:`image_scores`.
      sigma: See :func:`anomaly_map`, also for the next two.
      kernel_size: Window of the blur.
      close: Box of the grey closing, None for none.
      background: "quantile" or "otsu" sets patches of low saliency to 0, see :func:`background_mask`; "" does not.
      center_crop: Whether images are resized to ``side / 0.875`` and cropped.
      canvas: Side to which images are resized for tiles of the backbone's side; 0 for no tiles.
      overlap: Share of a tile that the next one repeats.
    """

    explained_variance: float = 0.99
    rank: int | None = None
    method: str = "reconstruction"
    drop_leading: int = 0
    rotations: int = 30
    aggregate: str = "mtop1p"
    sigma: float = 4.0
    kernel_size: int | None = 3
    close: int | None = None
    background: str = ""
    center_crop: bool = False
    canvas: int = 0
    overlap: float = 0.0

    def __post_init__(self):
        if not 0 < self.explained_variance <= 1:
            raise ValueError(f"explained_variance: expected a share in (0, 1], got {self.explained_variance}")
        for name, known in (("method", METHODS), ("aggregate", AGGREGATIONS), ("background", ("", "quantile", "otsu"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        for name in ("drop_leading", "rotations", "canvas", *(("rank",) if self.rank is not None else ())):
            linalg.check_integer(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")


class Scored(NamedTuple):
    """Scores of images.

    Attributes:
      scores: ``[images]`` float32, higher is more anomalous.
      maps: ``[images, side, side]`` float32.
    """

    scores: np.ndarray
    maps: np.ndarray


class _Scorer(NamedTuple):
    """The subspace as it is scored with: a basis of what is kept, or of what is left."""

    subspace: PCASubspace
    basis: jax.Array | None
    complement: jax.Array | None


class SubspaceAD:
    """Flags and localizes what is unlike some normal images, without training (arXiv 2602.23013).

    Args:
      backbone: What computes features of patches.
      params: Its parameters.
      settings: How features are scored.
      batch_size: Images of a batch, rounded up to a multiple of the devices.
      mesh: Mesh over which batches are sharded and the model is replicated; all devices along ``data`` by default.

    Attributes:
      moments: Moments of the features of all images fitted to, float32; None before.
      subspace: The subspace of normal variation; None before.
    """

    def __init__(
        self,
        backbone: Backbone,
        params: PyTree = (),
        settings: SubspaceADSettings = SubspaceADSettings(),
        *,
        batch_size: int = 8,
        mesh: Mesh | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if settings.canvas and settings.canvas < backbone.side:
            raise ValueError(f"canvas: expected at least the side {backbone.side} of a tile, got {settings.canvas}")
        if settings.rank is not None and not 0 <= settings.rank <= backbone.width:
            raise ValueError(f"rank: expected 0 to {backbone.width}, the width of the features, got {settings.rank}")
        if settings.background and getattr(backbone, "saliency", None) is None:
            raise ValueError(f"background: {settings.background!r} needs a backbone with a saliency, which has none")
        self.backbone, self.settings = backbone, settings
        self.moments: Moments | None = None
        self.subspace: PCASubspace | None = None
        self._mesh = train.make_mesh() if mesh is None else mesh
        ways = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        self._batch_size = -(-batch_size // ways) * ways
        self._replicated = NamedSharding(self._mesh, P())
        self._params = jax.device_put(params, self._replicated)
        self._scorer: _Scorer | None = None
        self._origins = None
        side = settings.canvas or backbone.side
        if settings.canvas:
            self._origins = tile_origins(side, side, backbone.side, settings.overlap)
        larger = int(side / 0.875) if settings.center_crop else side
        crop = (side, side) if settings.center_crop else None
        self._prepare = data.ImageProcessor(size=(larger, larger), crop=crop, as_bytes=True)

    @property
    def side(self) -> int:
        """Side of the maps."""
        return self.settings.canvas or self.backbone.side

    def fit(self, images: Iterable[np.ndarray], key: jax.Array | None = None) -> "SubspaceAD":
        """Fits to normal images, and forgets earlier ones.

        Args:
          images: uint8 ``[height, width, 3]``, of any sizes; resized by themselves.
          key: Random key of the rotations; not needed without.

        Returns:
          The model itself.

        Raises:
          ValueError: There are no images, they have fewer than two patches or only equal ones, or there are rotations
            without a key.
        """
        return self.set_moments(self.moments_of(images, key))

    def update(self, images: Iterable[np.ndarray], key: jax.Array | None = None) -> "SubspaceAD":
        """Adds normal images to those fitted to; arguments and errors: see :meth:`fit`."""
        more = self.moments_of(images, key)
        return self.set_moments(more if self.moments is None else merge_moments(self.moments, more))

    def moments_of(self, images: Iterable[np.ndarray], key: jax.Array | None = None) -> Moments:
        """Moments of the features of normal images and their rotations, in the memory of one batch and ``[d, d]``.

        Arguments and errors: see :meth:`fit`.
        """
        moments = jax.device_put(init_moments(self.backbone.width), self._replicated)
        count = 0
        for batch, real in self._batches(self._augmented(images, key)):
            weights = np.arange(len(batch)) < real
            moments = _add(self.backbone, self._params, moments, *self._on_devices(batch, weights.astype(np.float32)))
            count += real
        if not count:
            raise ValueError("images: expected at least one normal image, got none")
        return moments

    def set_moments(self, moments: Moments) -> "SubspaceAD":
        """Solves for the subspace of moments, and scores with it from now on."""
        s = self.settings
        subspace = solved_subspace(moments, explained_variance=s.explained_variance, rank=s.rank)
        self.moments, self.subspace = moments, subspace
        self._scorer = jax.device_put(_scorer(subspace, s), self._replicated)
        return self

    def score(self, images: Iterable[np.ndarray]) -> Scored:
        """Scores images; arguments as of :meth:`fit`.

        Raises:
          ValueError: The model is not fitted, or there are no images.
        """
        found = list(self.score_stream(images))
        if not found:
            raise ValueError("images: expected at least one image, got none")
        scores, maps = zip(*found, strict=True)
        return Scored(np.array(scores, np.float32), np.stack(maps))

    def score_stream(self, images: Iterable[np.ndarray]) -> Iterator[tuple[float, np.ndarray]]:
        """Yields score and map ``[side, side]`` of each image, in the memory of some batches."""
        if self._scorer is None:
            raise ValueError("score: expected a fitted model; call fit or load first")
        waiting: deque = deque()
        for batch, real in self._batches(self._prepare(image) for image in images):
            waiting.append((*self._score_batch(batch), real))
            if len(waiting) >= _IN_FLIGHT:
                yield from _fetched(*waiting.popleft())
        while waiting:
            yield from _fetched(*waiting.popleft())

    def fit_score(self, images: Iterable[np.ndarray]) -> Scored:
        """Batched zero-shot: fits to unlabelled images, of which most are normal, and scores the same (step 10)."""
        images = list(images)
        moments = self.moments_of(images, jax.random.key(0)) if self.settings.rotations else self.moments_of(images)
        return self.set_moments(moments).score(images)

    def features(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Features of images without rotations, ``[images, h, w, width]`` float32; tiles count as images."""
        prepared = (tile for image in images for tile in self._tiles(self._prepare(image)))
        found = [
            np.asarray(_features(self.backbone, self._params, *self._on_devices(batch)))[:real]
            for batch, real in self._batches(prepared)
        ]
        return np.concatenate(found)

    def _score_batch(self, batch: np.ndarray) -> tuple[jax.Array, jax.Array]:
        if self._origins is None:
            run = _score(self.backbone, self.settings, self._params, self._scorer, *self._on_devices(batch))
            return run
        maps = []
        for image in batch:
            parts = [
                _score(self.backbone, self.settings, self._params, self._scorer, *self._on_devices(tiles))[1][:real]
                for tiles, real in self._batches(self._tiles(image))
            ]
            maps.append(merge_tiles(jnp.concatenate(parts), self._origins, (self.side, self.side)))
        maps = jnp.stack(maps)
        return image_scores(maps, self.settings.aggregate), maps

    def _augmented(self, images: Iterable[np.ndarray], key: jax.Array | None) -> Iterator[np.ndarray]:
        count = self.settings.rotations
        if count and key is None:
            raise ValueError(f"key: expected a random key for {count} rotations of each image, got None")
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel()) if count else None
        for image in images:
            yield from self._tiles(self._prepare(image))
            for _ in range(count):
                angle = float(rng.uniform(0, _LARGEST_ANGLE))
                turned = Image.fromarray(np.asarray(image)).rotate(angle, Image.Resampling.NEAREST)
                yield from self._tiles(self._prepare(np.asarray(turned)))

    def _tiles(self, image: np.ndarray) -> Iterator[np.ndarray]:
        if self._origins is None:
            yield image
        else:
            for left, top, right, bottom in self._origins:
                yield image[top:bottom, left:right]

    def _batches(self, images: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
        """Yields batches of one shape, the last one padded, and how many of them are images."""
        held: list[np.ndarray] = []
        for image in images:
            held.append(image)
            if len(held) == self._batch_size:
                yield np.stack(held), len(held)
                held = []
        if held:
            yield np.stack(held + held[-1:] * (self._batch_size - len(held))), len(held)

    def _on_devices(self, *arrays: np.ndarray) -> list[jax.Array]:
        sharding = train.batch_sharding(self._mesh)
        return [jax.make_array_from_process_local_data(sharding, array) for array in arrays]


def _fetched(scores: jax.Array, maps: jax.Array, real: int) -> Iterator[tuple[float, np.ndarray]]:
    scores, maps = np.asarray(scores), np.asarray(maps)
    return ((float(scores[i]), maps[i]) for i in range(real))


def _scorer(subspace: PCASubspace, settings: SubspaceADSettings) -> _Scorer:
    """Prepares a subspace for its method; the smaller of basis and complement is multiplied by."""
    d = subspace.components.shape[0]
    padded = subspace._replace(components=padded_columns(subspace.components))
    kept = subspace.components[:, settings.drop_leading :]
    if settings.method != "reconstruction" or not kept.shape[1]:
        return _Scorer(padded, None, None)
    if d / 3 < kept.shape[1] < d:
        return _Scorer(padded, None, padded_columns(kernels.complement_basis(kept)))
    return _Scorer(padded, padded_columns(kept), None)


@functools.partial(jax.jit, static_argnums=0)
def _features(backbone: Backbone, params: PyTree, images: jax.Array) -> jax.Array:
    return backbone.features(params, images)[0].astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _add(backbone: Backbone, params: PyTree, moments: Moments, images: jax.Array, weights: jax.Array) -> Moments:
    features, _ = backbone.features(params, images)
    batch, h, w, d = features.shape
    each = jnp.broadcast_to(weights[:, None], (batch, h * w))
    return update_moments(moments, features.reshape(-1, d), each.reshape(-1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    backbone: Backbone, settings: SubspaceADSettings, params: PyTree, scorer: _Scorer, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scores ``[batch]`` and maps ``[batch, side, side]``: backbone, residual and map in one program."""
    features, saliency = backbone.features(params, images)
    grid, rows = features.shape[:3], features.reshape(-1, features.shape[-1])
    if scorer.basis is None and scorer.complement is None:
        found = residual_score(scorer.subspace, rows, method=settings.method, drop_leading=settings.drop_leading)
    else:
        found = kernels.subspace_residual(rows, scorer.subspace.mean, scorer.basis, complement=scorer.complement)
    found = found.reshape(grid)
    if settings.background:
        found = jnp.where(background_mask(saliency, settings.background), found, 0)
    options = {"sigma": settings.sigma, "kernel_size": settings.kernel_size, "close": settings.close}
    maps = anomaly_map(found, (backbone.side, backbone.side), **options)
    return image_scores(maps, settings.aggregate), maps
