"""Configs of Swin transformers, and the sizes of published ones."""

import dataclasses
from dataclasses import dataclass

from subspace_jax.nn.layers.activations import ACTIVATIONS


@dataclass(frozen=True)
class SwinConfig:
    """A Swin transformer (Liu et al., arXiv 2103.14030): attention in windows, shifted in every other block.

    Attributes:
      image_size: Height and width of the images that the model was trained on.
      patch_size: Side of a patch.
      embed_dim: Width of the first stage; it doubles with every stage.
      depths: Number of blocks of each stage.
      num_heads: Number of heads of each stage.
      window: Side of a window, in patches.
      mlp_ratio: Inner width of the perceptrons over the width of the stage.
      norm_eps: Epsilon of the blocks' norms and of the last one; that of patch embedding and merging is 1e-5.
      activation: Name of the activation function.
      qkv_bias: Whether queries, keys and values have biases.
      absolute_positions: Whether learned position embeddings are added to the patches.
      num_classes: Number of classes; 0 for no head.
      channels: Channels of the images.
      drop_path: Rate of stochastic depth at the last block, growing linearly from 0 at the first.
      convention: "hf" or "timm".  With "hf", hidden state ``s + 1`` is taken after patch merging of stage ``s``, and
        shifts depend on the size of the given images.  With "timm", it is taken before, shifts are those of
        ``image_size``, and every stage must be a multiple of the window.
      architecture: timm's name of the architecture, for models from timm.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-5
    activation: str = "gelu"
    qkv_bias: bool = True
    absolute_positions: bool = False
    num_classes: int = 1000
    channels: int = 3
    drop_path: float = 0.0
    convention: str = "timm"
    architecture: str | None = None

    def __post_init__(self):
        for name, known in (("convention", ("hf", "timm")), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        for name in ("patch_size", "embed_dim", "window", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if len(self.image_size) != 2 or min(self.image_size) < self.patch_size:
            raise ValueError(
                f"image_size: expected height and width of at least a patch of {self.patch_size}, got {self.image_size}"
            )
        if not self.depths or len(self.depths) != len(self.num_heads) or min(self.depths) < 1:
            raise ValueError(f"depths: expected a positive number for each of num_heads, got {self.depths}")
        for width, heads in zip(self.widths, self.num_heads, strict=True):
            if heads < 1 or width % heads:
                raise ValueError(f"num_heads: expected divisors of the widths {self.widths}, got {self.num_heads}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes: expected at least 0, got {self.num_classes}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: expected a number in [0, 1), got {self.drop_path}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))

    @property
    def out_features(self) -> int:
        """Width of the pooled features."""
        return self.widths[-1]

    def maps(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Returns the patches of an image along each side, for each stage."""
        sides = (-(-height // self.patch_size), -(-width // self.patch_size))
        maps = [sides]
        for _ in self.depths[1:]:
            maps.append(tuple(-(-n // 2) for n in maps[-1]))
        return tuple(maps)

    def replace(self, **changes) -> "SwinConfig":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def swin(cls, size: str = "tiny", **changes) -> "SwinConfig":
        """Swin for 224 x 224 images with windows of 7: ``size`` is "tiny", "small", "base" or "large"."""
        sizes = {"tiny": (96, 6, 3), "small": (96, 18, 3), "base": (128, 18, 4), "large": (192, 18, 6)}
        if size not in sizes:
            raise ValueError(f"size: expected one of {sorted(sizes)}, got {size!r}")
        width, depth, heads = sizes[size]
        fields = {
            "embed_dim": width,
            "depths": (2, 2, depth, 2),
            "num_heads": tuple(heads * 2**stage for stage in range(4)),
        }
        return cls(**{**fields, **changes})
