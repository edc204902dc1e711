"""Configs of BERT encoders."""

import dataclasses
from dataclasses import dataclass

from subspace_jax.nn.layers.encoder import Encoder, check_size


@dataclass(frozen=True)
class BertConfig:
    """A bidirectional text encoder (Devlin et al., arXiv 1810.04805), of post-norm layers with learned positions.

    Attributes:
      vocab_size: Size of the vocabulary, ``V``.
      max_length: Longest text, ``T``.
      width: Width of the residual stream, ``d``.
      num_layers: Number of layers.
      num_heads: Number of heads.
      mlp_size: Inner width of the perceptron.
      num_types: Number of token types.
      norm_eps: Epsilon of all norms.
      activation: Name of the activation function.
      pooler: Whether there is a dense layer with tanh over the state of the first token.
      pad_token: Padding token.
    """

    vocab_size: int
    max_length: int
    width: int
    num_layers: int
    num_heads: int
    mlp_size: int
    num_types: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    pooler: bool = True
    pad_token: int = 0

    def __post_init__(self):
        for name in ("vocab_size", "max_length", "num_types"):
            check_size(name, getattr(self, name))
        if not 0 <= self.pad_token < self.vocab_size:
            raise ValueError(f"pad_token: expected a token below {self.vocab_size}, got {self.pad_token}")
        _ = self.encoder  # Checks the sizes of the layers.

    @property
    def encoder(self) -> Encoder:
        """The layers."""
        names = ("width", "num_layers", "num_heads", "mlp_size", "norm_eps", "activation")
        return Encoder(**{name: getattr(self, name) for name in names}, post_norm=True)

    def replace(self, **changes) -> "BertConfig":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)
