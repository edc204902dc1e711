"""What every vision backbone returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class VisionOutput(NamedTuple):
    """The outputs of a vision backbone; what a call did not ask for, or a family does not have, is None.

    Attributes:
      logits: Class scores ``[batch, classes]``, where the model has a head.
      pooled: One feature vector an image, ``[batch, width]``, as the family pools it.
      tokens: The last features before pooling: ``[batch, tokens, width]``, or ``[batch, height, width, channels]`` of
        convolutional networks.
      hidden: The captured hidden states, in the order of depth; entry 0 is that of the embeddings.
      batch_stats: Running statistics after a training pass, as a tree like the one of the parameters' statistics.
    """

    logits: jax.Array | None = None
    pooled: jax.Array | None = None
    tokens: jax.Array | None = None
    hidden: tuple[jax.Array, ...] | None = None
    batch_stats: Any = None
