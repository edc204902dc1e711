"""What a sparse autoencoder is made of."""

import itertools
from dataclasses import dataclass

SPARSIFIERS = ("topk", "batchtopk", "matryoshka", "jumprelu")
DECODERS = ("shared", "separate", "linear")
INNERS = ("polynomial", "linear")
DTYPES = ("float32", "bfloat16")
_WIDTHS = (
    (4096, ()),
    (16384, (512, 2048)),
    (32768, (512, 2048, 8192)),
    (65536, (1024, 4096, 16384, 32768)),
)
_WIDEST = (2048, 8192, 32768, 65536)


@dataclass(frozen=True)
class PolySAEConfig:
    """A sparse autoencoder with a linear or a polynomial decoder (arXiv 2602.01322).

    Attributes:
      d_in: Width of the activations, d.
      d_sae: Number of features, m.
      k: Features of a code: of each example with "topk", on average with "batchtopk" and "matryoshka", where it may be
        fractional; without meaning with "jumprelu".
      ranks: Ranks (R1, R2, R3) of the decoder; without meaning with a linear one.
      order: Degree of the decoder, 1 to 3.
      sparsifier: "topk", "batchtopk", "matryoshka" (BatchTopK with nested losses) or "jumprelu".
      widths: Nested widths of "matryoshka", the last of them m; those of :func:`default_widths` by default.
      rescale: Whether pre-activations are multiplied by the norms of the decoder, and codes divided by them.
      decoder: "shared" (one factor U of all orders), "separate" (one of each, an ablation) or "linear" (a dictionary
        ``W_dec``, the plain sparse autoencoder).
      inner: What the nested losses of "matryoshka" decode by: "polynomial", the decoder itself on the first features,
        or "linear", a dictionary of their own, as the authors' code does.
      dead_after: Steps without firing after which a feature is dead.
      aux_coefficient: Factor of the loss of dead features.
      l0_coefficient: Factor of the number of features of a code in the loss, with "jumprelu".
      l0_warmup: Steps over which that factor grows from 0.
      bandwidth: Width of the kernel of the thresholds' gradients, with "jumprelu".
      dtype: Type of the factors of large matmuls, "float32" or "bfloat16"; sums and powers are float32.

    Raises:
      ValueError: A field is out of range.
    """

    d_in: int
    d_sae: int
    k: float
    ranks: tuple[int, int, int] = (0, 0, 0)
    order: int = 3
    sparsifier: str = "topk"
    widths: tuple[int, ...] | None = None
    rescale: bool = False
    decoder: str = "shared"
    inner: str = "polynomial"
    dead_after: int = 1000
    aux_coefficient: float = 1.0
    l0_coefficient: float = 1.0
    l0_warmup: int = 0
    bandwidth: float = 0.05
    dtype: str = "float32"

    def __post_init__(self):
        for name, known in (
            ("sparsifier", SPARSIFIERS),
            ("decoder", DECODERS),
            ("inner", INNERS),
            ("dtype", DTYPES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        for name in ("d_in", "d_sae", "dead_after"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {getattr(self, name)!r}")
        if not 0 < self.k <= self.d_sae:
            raise ValueError(f"k: expected a number above 0 and at most the {self.d_sae} features, got {self.k}")
        if self.sparsifier == "topk" and self.k != int(self.k):
            raise ValueError(f"k: expected an integer with the sparsifier 'topk', got {self.k}")
        if self.order not in (1, 2, 3):
            raise ValueError(f"order: expected 1, 2 or 3, got {self.order!r}")
        for name in ("aux_coefficient", "l0_coefficient", "l0_warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth: expected a number above 0, got {self.bandwidth}")
        if self.decoder != "linear":
            self._check_ranks()
        self._check_widths()

    def _check_ranks(self):
        if len(self.ranks) != 3 or any(not isinstance(r, int) or r < 1 for r in self.ranks):
            raise ValueError(f"ranks: expected three integers (R1, R2, R3) of at least 1, got {self.ranks}")
        first, second, third = self.ranks
        if first > self.d_sae:
            raise ValueError(f"ranks: expected R1 of at most the {self.d_sae} features, got {first}")
        if max(second, third) > first or (self.decoder == "separate" and third > second):
            order = "R1 >= R2 >= R3" if self.decoder == "separate" else "R2 and R3 of at most R1"
            raise ValueError(f"ranks: expected {order}, got {self.ranks}")

    def _check_widths(self):
        if self.widths is None:
            return
        increasing = all(a < b for a, b in itertools.pairwise((0, *self.widths)))
        if not self.widths or not increasing or self.widths[-1] != self.d_sae:
            raise ValueError(
                f"widths: expected increasing widths that end with the {self.d_sae} features, got {self.widths}"
            )

    @property
    def nested(self) -> tuple[int, ...]:
        """Widths of the nested losses, all of them below m."""
        if self.sparsifier != "matryoshka":
            return ()
        return (default_widths(self.d_sae) if self.widths is None else self.widths)[:-1]

    @property
    def whole_batch(self) -> bool:
        """Whether a code depends on the other examples of the batch."""
        return self.sparsifier in ("batchtopk", "matryoshka")

    @property
    def has_dictionary(self) -> bool:
        """Whether there is a linear dictionary ``W_dec [m, d]``."""
        return self.decoder == "linear" or (self.inner == "linear" and bool(self.nested))


def default_widths(d_sae: int) -> tuple[int, ...]:
    """Returns the nested widths of the authors' code for a number of features."""
    inner = next((widths for most, widths in _WIDTHS if d_sae <= most), _WIDEST)
    return (*(w for w in inner if w < d_sae), d_sae)
