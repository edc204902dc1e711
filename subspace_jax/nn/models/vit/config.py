"""Configs of vision transformers, and the sizes of published ones."""

import dataclasses
from dataclasses import dataclass

from subspace_jax.nn.layers.activations import ACTIVATIONS
from subspace_jax.nn.layers.drop_path import drop_path_rates
from subspace_jax.nn.layers.encoder import Encoder, check_size

FAMILIES = ("vit", "deit", "deit3", "clip", "siglip", "dinov2")
POOLS = ("token", "distilled", "mean", "attention", "none")
NORMS = ("tokens", "pooled", "nothing")

_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
    "giant": (1536, 40, 24),
}


@dataclass(frozen=True)
class VisionTransformerConfig:
    """A vision transformer (Dosovitskiy et al., arXiv 2010.11929) of one of the families that share its layers.

    The order of tokens is class, distillation, registers, patches row by row.

    Attributes:
      family: The family whose tensor names checkpoints use: "vit", "deit", "deit3", "clip", "siglip" or "dinov2".  It
        does not affect the computation.
      image_size: Height and width of the images that the position embeddings are for.
      patch_size: Side of a patch.
      width: Width of the residual stream, ``d``.
      num_layers: Number of layers.
      num_heads: Number of heads.
      mlp_size: Inner width of the perceptron.
      num_classes: Number of classes; 0 for no head.
      channels: Channels of an image.
      norm_eps: Epsilon of all norms.
      activation: See :class:`Encoder`.
      gated_mlp: See :class:`Encoder`; DINOv2's giant has it, with "silu" (SwiGLU).
      fused_qkv: See :class:`Encoder`; timm's checkpoints have it.
      qkv_bias: See :class:`Encoder`.
      layer_scale: See :class:`Encoder`.
      patch_bias: Whether the patch embedding has a bias.
      class_token: Whether there is a class token.
      distillation_token: Whether there is DeiT's second token (arXiv 2012.12877).
      registers: Number of register tokens, which have no positions (arXiv 2309.16588).
      mask_token: Whether checkpoints hold the mask token of pretraining; it is never used.
      class_position: Whether class and distillation token have position embeddings; those of DeiT III have none.
      pre_norm: Whether the embeddings are normalized before the first layer, as in CLIP.
      norm_at: Input of the last norm: all "tokens", the "pooled" vector, or "nothing" (a classifier on CLIP's tokens,
        whose checkpoints hold the norm unused).
      pool: Pooling: the class "token", the mean of class and distillation token ("distilled"), the "mean" over
        patches, "attention" with a learned query (SigLIP), or "none".
      attention_pool: Whether there are parameters of attention pooling; a SigLIP classifier holds them unused.
      pooler_size: Width of a further dense layer after pooling; 0 for none.
      pooler_activation: Its activation.
      distilled_head: Whether the distillation token has a head of its own; the logits are the mean of both heads.
      antialias_positions: How position embeddings are resampled; see :func:`resample_positions`.
      drop_path: Rate of stochastic depth at the last layer, growing linearly from 0 at the first (arXiv 1603.09382);
        or a rate for each layer.
      architecture: timm's name of the architecture, for models from timm.
    """

    family: str
    image_size: tuple[int, int]
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_size: int
    num_classes: int = 0
    channels: int = 3
    norm_eps: float = 1e-6
    activation: str = "gelu"
    gated_mlp: bool = False
    fused_qkv: bool = False
    qkv_bias: bool = True
    layer_scale: bool = False
    patch_bias: bool = True
    class_token: bool = True
    distillation_token: bool = False
    registers: int = 0
    mask_token: bool = False
    class_position: bool = True
    pre_norm: bool = False
    norm_at: str = "tokens"
    pool: str = "token"
    attention_pool: bool = False
    pooler_size: int = 0
    pooler_activation: str = "tanh"
    distilled_head: bool = False
    antialias_positions: bool = False
    drop_path: float | tuple[float, ...] = 0.0
    architecture: str | None = None

    def __post_init__(self):
        for name in ("patch_size", "channels"):
            check_size(name, getattr(self, name))
        for name, known in (("family", FAMILIES), ("norm_at", NORMS), ("pool", POOLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        _ = self.encoder  # Checks the sizes of the layers.
        object.__setattr__(self, "image_size", tuple(self.image_size))
        if len(self.image_size) != 2 or min(self.image_size) < self.patch_size:
            raise ValueError(
                f"image_size: expected height and width of at least a patch of {self.patch_size}, got {self.image_size}"
            )
        if self.num_classes < 0 or self.registers < 0 or self.pooler_size < 0:
            raise ValueError("num_classes, registers and pooler_size: expected no negative number")
        needs = {"token": self.class_token, "distilled": self.distillation_token, "attention": self.attention_pool}
        if not needs.get(self.pool, True):
            raise ValueError(f"pool: the model has no {self.pool!r} to pool")
        if self.num_classes and self.pool == "none":
            raise ValueError(f"num_classes: {self.num_classes} classes need a pooled vector, got pool='none'")
        if self.distilled_head and not (self.distillation_token and self.num_classes):
            raise ValueError("distilled_head: expected a distillation token and classes")
        if not all(0 <= rate < 1 for rate in self.drop_rates) or len(self.drop_rates) != self.num_layers:
            raise ValueError(f"drop_path: expected rates in [0, 1) of {self.num_layers} layers, got {self.drop_path}")
        if self.pooler_activation not in ACTIVATIONS:
            raise ValueError(
                f"pooler_activation: expected one of {sorted(ACTIVATIONS)}, got {self.pooler_activation!r}"
            )

    @property
    def encoder(self) -> Encoder:
        """The layers."""
        own = {f.name for f in dataclasses.fields(self)}
        return Encoder(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Encoder) if f.name in own})

    @property
    def out_features(self) -> int:
        """Width of the pooled features, before ``pooler_size``."""
        return self.width

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width of an image of ``image_size``."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches."""
        return self.class_token + self.distillation_token + self.registers

    @property
    def position_rows(self) -> int:
        """Number of position embeddings."""
        own = self.class_token + self.distillation_token if self.class_position else 0
        return own + self.grid[0] * self.grid[1]

    @property
    def drop_rates(self) -> tuple[float, ...]:
        """Rate of stochastic depth of each layer."""
        return self.drop_path if isinstance(self.drop_path, tuple) else drop_path_rates(self.drop_path, self.num_layers)

    def replace(self, **changes) -> "VisionTransformerConfig":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def vit(
        cls, size: str = "base", patch_size: int = 16, image_size: int = 224, **changes
    ) -> "VisionTransformerConfig":
        """ViT of the size "tiny", "small", "base", "large" or "huge" with 1000 classes, as timm's augreg models."""
        fields = {"num_classes": 1000, "fused_qkv": True, "antialias_positions": True}
        return cls._sized("vit", size, patch_size, image_size, {**fields, **changes})

    @classmethod
    def deit3(
        cls, size: str = "base", patch_size: int = 16, image_size: int = 224, **changes
    ) -> "VisionTransformerConfig":
        """DeiT III (arXiv 2204.07118): LayerScale, and a class token without a position embedding."""
        fields = {"num_classes": 1000, "fused_qkv": True, "antialias_positions": True}
        fields |= {"layer_scale": True, "class_position": False}
        return cls._sized("deit3", size, patch_size, image_size, {**fields, **changes})

    @classmethod
    def dinov2(cls, size: str = "base", registers: int = 0, **changes) -> "VisionTransformerConfig":
        """DINOv2 (arXiv 2304.07193) of the size "small", "base", "large" or "giant", with 0 or 4 registers."""
        fields = {"layer_scale": True, "mask_token": True, "registers": registers}
        fields["antialias_positions"] = registers > 0
        if size == "giant":
            fields |= {"gated_mlp": True, "activation": "silu", "mlp_size": swiglu_size(1536)}
        return cls._sized("dinov2", size, 14, 518, {**fields, **changes})

    @classmethod
    def _sized(
        cls, family: str, size: str, patch_size: int, image_size: int, fields: dict
    ) -> "VisionTransformerConfig":
        if size not in _SIZES:
            raise ValueError(f"size: expected one of {sorted(_SIZES)}, got {size!r}")
        width, layers, heads = _SIZES[size]
        own = {"width": width, "num_layers": layers, "num_heads": heads, "mlp_size": 4 * width}
        image = (image_size, image_size)
        return cls(**{"family": family, "image_size": image, "patch_size": patch_size, **own, **fields})


def swiglu_size(width: int, mlp_ratio: float = 4) -> int:
    """Returns the inner width of DINOv2's gated perceptron: two thirds of the usual one, up to a multiple of 8."""
    return 8 * ((int(int(width * mlp_ratio) * 2 / 3) + 7) // 8)
