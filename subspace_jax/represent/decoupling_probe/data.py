"""A synthetic mixture of domains, one of which has most examples."""

from collections.abc import Sequence

import numpy as np

DOMAINS = ("dominant", "second", "third")
NUM_CLASSES = 5


def domain_mixture(
    seed: int, num_train: int = 2000, num_test: int = 2000, shares: Sequence[float] = (0.8, 0.1, 0.1)
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Draws points ``x = content[label] + 2 sqrt(3) u[domain] + noise`` in R^32.

    The content is one of five standard normal vectors, ``u`` three orthonormal directions, the noise standard normal.
    Label and domain are independent: a classifier needs no domain, and a linear probe tells it at first sight.

    Args:
      seed: Seed of vectors, labels and noise, at least 0.
      num_train: Training points.
      num_test: Test points.
      shares: Probabilities of the three domains.

    Returns:
      Training and test set: ``inputs`` float32 ``[points, 32]``, ``labels`` and ``domains`` int32 ``[points]``.

    Raises:
      ValueError: A number is out of range.

    Source: a synthetic stand-in for the varieties of a language in arXiv 2508.12803.
    """
    if min(num_train, num_test) < 1:
        raise ValueError(f"num_train, num_test: expected at least 1, got {num_train} and {num_test}")
    if len(shares) != len(DOMAINS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares: expected {len(DOMAINS)} probabilities with a sum of 1, got {tuple(shares)}")
    rng = np.random.default_rng(seed)
    content = rng.standard_normal((NUM_CLASSES, 32))
    directions = np.linalg.qr(rng.standard_normal((32, len(DOMAINS))))[0].T

    def points(count: int) -> dict[str, np.ndarray]:
        labels, domains = rng.integers(NUM_CLASSES, size=count), rng.choice(len(DOMAINS), size=count, p=shares)
        x = content[labels] + 2 * np.sqrt(3) * directions[domains] + rng.standard_normal((count, 32))
        return {"inputs": x.astype(np.float32), "labels": labels.astype(np.int32), "domains": domains.astype(np.int32)}

    return points(num_train), points(num_test)
