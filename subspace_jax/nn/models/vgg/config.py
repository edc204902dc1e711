"""The config of VGG networks."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class VGGConfig:
    """A VGG network (Simonyan and Zisserman, arXiv 1409.1556) with batch normalization; VGG13-BN by default.

    Attributes:
      depths: Number of convolutions of each stage; max-pooling after a stage halves the resolution.
      widths: Channels of each stage.
      hidden: Widths of the fully connected layers; the last is the feature width.
      dropout: Rate of dropout after each of them.
      image_size: Height and width of the images, which fix the width of the first fully connected layer.
      num_classes: Number of classes; 0 for no head.
      channels: Channels of the images.
      norm_eps: Epsilon of batch normalization.
      norm_momentum: Weight of the old running statistics.
    """

    depths: tuple[int, ...] = (2, 2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    hidden: tuple[int, ...] = (4096, 4096)
    dropout: tuple[float, ...] = (0.5, 0.5)
    image_size: tuple[int, int] = (224, 224)
    num_classes: int = 1000
    channels: int = 3
    norm_eps: float = 1e-5
    norm_momentum: float = 0.9

    def __post_init__(self):
        if not self.depths or len(self.depths) != len(self.widths) or min(*self.depths, *self.widths) < 1:
            raise ValueError(f"depths: expected a positive number for each of widths {self.widths}, got {self.depths}")
        if not self.hidden or len(self.hidden) != len(self.dropout) or min(self.hidden) < 1:
            raise ValueError(f"hidden: expected a positive width for each of dropout {self.dropout}, got {self.hidden}")
        if any(not 0 <= rate < 1 for rate in self.dropout):
            raise ValueError(f"dropout: expected rates in [0, 1), got {self.dropout}")
        if len(self.image_size) != 2 or min(self.image_size) < 2 ** len(self.depths):
            raise ValueError(f"image_size: expected at least {2 ** len(self.depths)} pixels, got {self.image_size}")

    @property
    def out_features(self) -> int:
        """Width of the pooled features."""
        return self.hidden[-1]

    def replace(self, **changes) -> "VGGConfig":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)
