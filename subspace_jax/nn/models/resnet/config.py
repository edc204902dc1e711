"""Configs of residual networks, and the sizes of published ones."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class ResNetBlock(NamedTuple):
    """One residual block.

    Attributes:
      name: Its path in the parameters, ``("stage0", "block1")``.
      widths: Input, inner and output channels.
      strides: Stride of the block.
      projects: Whether its shortcut has a convolution.
    """

    name: tuple[str, str]
    widths: tuple[int, int, int]
    strides: int
    projects: bool


@dataclass(frozen=True)
class ResNetConfig:
    """A residual network: a stem, stages of blocks at decreasing resolution, global average pooling, a linear head.

    Attributes:
      depths: Number of blocks of each stage.
      widths: Output channels of each stage.
      inner_widths: Channels inside the blocks of each stage; None for a quarter of ``widths`` (bottleneck) or for
        ``widths`` (basic).
      block: "bottleneck" (1x1, 3x3, 1x1 convolutions) or "basic" (two of 3x3).
      stem: Channels of the stem's convolutions: one of 7x7, or three of 3x3, the first with stride 2.
      average_shortcut: Whether a strided shortcut applies average pooling of 2x2 before its convolution (ResNet-D,
        arXiv 1812.01187) instead of a strided convolution.
      stride_first: Whether the stride of a bottleneck is in its first convolution (2015) instead of the 3x3 ("v1.5").
      first_strides: Stride of the first stage, 1 or 2; it is 2 in all others.
      groups: Groups of the 3x3 convolutions of bottlenecks (ResNeXt, arXiv 1611.05431).
      num_classes: Number of classes; 0 for no head.
      channels: Channels of the images.
      drop_path: Rate of stochastic depth at the last block, growing linearly from 0 at the first.
      norm_eps: Epsilon of batch normalization.
      norm_momentum: Weight of the old running statistics.
      convention: Hidden state 0 is the output of the stem after its max-pool ("hf") or before it ("timm"); all else is
        the same.
      architecture: timm's name of the architecture, for models from timm.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    inner_widths: tuple[int, ...] | None = None
    block: str = "bottleneck"
    stem: tuple[int, ...] = (64,)
    average_shortcut: bool = False
    stride_first: bool = False
    first_strides: int = 1
    groups: int = 1
    num_classes: int = 1000
    channels: int = 3
    drop_path: float = 0.0
    norm_eps: float = 1e-5
    norm_momentum: float = 0.9
    convention: str = "timm"
    architecture: str | None = None

    def __post_init__(self):
        for name, known in (
            ("block", ("bottleneck", "basic")),
            ("convention", ("hf", "timm")),
            ("first_strides", (1, 2)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        if self.inner_widths is None:
            factor = 4 if self.block == "bottleneck" else 1
            object.__setattr__(self, "inner_widths", tuple(width // factor for width in self.widths))
        for name in ("depths", "widths", "inner_widths"):
            sizes = getattr(self, name)
            if not sizes or len(sizes) != len(self.depths) or any(size < 1 for size in sizes):
                raise ValueError(
                    f"{name}: expected a positive number for each of {len(self.depths)} stages, got {sizes}"
                )
        if len(self.stem) not in (1, 3) or any(width < 1 for width in self.stem):
            raise ValueError(f"stem: expected the channels of one convolution or of three, got {self.stem}")
        if self.block == "basic" and (self.inner_widths != self.widths or self.groups != 1):
            raise ValueError("block: a basic block has one width and no groups; expected 'bottleneck'")
        if self.groups < 1 or any(width % self.groups for width in self.inner_widths):
            raise ValueError(f"groups: expected a divisor of the inner widths {self.inner_widths}, got {self.groups}")
        if self.num_classes < 0 or self.channels < 1:
            raise ValueError(
                f"num_classes: expected at least 0, got {self.num_classes}; channels: at least 1, got {self.channels}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: expected a number in [0, 1), got {self.drop_path}")

    @property
    def out_features(self) -> int:
        """Width of the pooled features."""
        return self.widths[-1]

    def blocks(self) -> Iterator[ResNetBlock]:
        """Iterates over the blocks in order."""
        entering = self.stem[-1]
        stages = zip(self.depths, self.inner_widths, self.widths, strict=True)
        for stage, (depth, inner, width) in enumerate(stages):
            for index in range(depth):
                strides = 1 if index else (2 if stage else self.first_strides)
                projects = strides != 1 or entering != width
                yield ResNetBlock((f"stage{stage}", f"block{index}"), (entering, inner, width), strides, projects)
                entering = width

    def replace(self, **changes) -> "ResNetConfig":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def resnet(cls, depth: int = 50, **changes) -> "ResNetConfig":
        """ResNet (He et al., arXiv 1512.03385) of 18, 34, 50, 101 or 152 layers, strides in the 3x3 convolutions."""
        if depth not in _DEPTHS:
            raise ValueError(f"depth: expected one of {sorted(_DEPTHS)}, got {depth!r}")
        basic = depth < 50
        fields = {
            "depths": _DEPTHS[depth],
            "widths": (64, 128, 256, 512) if basic else (256, 512, 1024, 2048),
            "block": "basic" if basic else "bottleneck",
        }
        return cls(**{**fields, **changes})

    @classmethod
    def resnet_d(cls, depth: int = 50, **changes) -> "ResNetConfig":
        """ResNet-D (He et al., arXiv 1812.01187): a deep stem, shortcuts with average pooling."""
        return cls.resnet(depth, **{"stem": (32, 32, 64), "average_shortcut": True, **changes})

    @classmethod
    def resnext50(cls, **changes) -> "ResNetConfig":
        """ResNeXt-50 32x4d (Xie et al., arXiv 1611.05431): 32 groups of 4 channels in the first stage."""
        return cls.resnet(50, **{"groups": 32, "inner_widths": (128, 256, 512, 1024), **changes})
