"""Configs of causal language models, and the sizes of published ones."""

import dataclasses
from dataclasses import dataclass, field

from subspace_jax.nn.layers.activations import ACTIVATIONS
from subspace_jax.nn.layers.rope import Rope, rope_frequencies

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
NORMS = ("rms", "rms_offset", "layer")


@dataclass(frozen=True)
class CausalLMConfig:
    """A decoder of pre-norm residual blocks: attention, then a multilayer perceptron.

    Attributes:
      family: The family whose tensor names checkpoints use: "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2" or
        "gemma3_text".  It does not affect the computation.
      vocab_size: Size of the vocabulary, ``V``.
      hidden_size: Width of the residual stream, ``d``.
      num_layers: Number of layers.
      num_heads: Number of query heads, ``H``.
      num_kv_heads: Number of key and value heads, ``K``; a divisor of ``num_heads`` (grouped queries, arXiv
        2305.13245).
      head_dim: Width of a head, ``h``; ``H h`` need not be ``d``.
      mlp_size: Inner width of the perceptron, ``f``.
      max_length: Longest sequence.
      norm: "rms", "rms_offset" with the factor ``1 + scale``, or "layer".
      norm_eps: Its epsilon.
      post_norms: Whether the outputs of attention and perceptron are normalized before they are added.
      qk_norm: Whether the queries and keys of each head are normalized, before they are rotated.
      rope: Rotary positions, or None for a learned table of ``max_length`` positions.
      local_rope: Rotary positions of the layers with a window, where they have their own.
      activation: Name of the activation function.
      gated_mlp: ``down(act(gate x) * up x)`` (arXiv 2002.05202) instead of ``down(act(up x))``.
      fused_qkv: One kernel for queries, keys and values, in this order along its output.
      qkv_bias: Whether queries, keys and values have biases.
      out_bias: Whether the attention's output has a bias.
      mlp_bias: Whether the perceptron has biases.
      windows: Sliding window of each layer, in tokens and the query's own included, or None for full attention.
      tied: Whether the logits come from the embedding table instead of a head.
      scale_embeddings: Whether embeddings are multiplied by ``sqrt(d)``.
      scale_scores: Whether scores are divided by ``sqrt(head_dim)``.
      score_dim: Number in place of ``head_dim`` there.
      scale_by_layer: Whether the scores of layer ``l`` are also divided by ``l + 1``.
      score_softcap: Bound of the scores, ``c`` in ``c tanh(scores / c)``, or None.
      logit_softcap: Bound of the logits, or None.
      bos_token: Token at the start of a text, or None.
      eos_tokens: Tokens that end a text.
      pad_token: Padding token, or None.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_length: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    post_norms: bool = False
    qk_norm: bool = False
    rope: Rope | None = field(default_factory=Rope)
    local_rope: Rope | None = None
    activation: str = "silu"
    gated_mlp: bool = True
    fused_qkv: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    windows: tuple[int | None, ...] | None = None
    tied: bool = False
    scale_embeddings: bool = False
    scale_scores: bool = True
    score_dim: float | None = None
    scale_by_layer: bool = False
    score_softcap: float | None = None
    logit_softcap: float | None = None
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()
    pad_token: int | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size")
        for name in (*sizes, "max_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        for name, known in (("family", FAMILIES), ("norm", NORMS), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of the {self.num_heads} query heads, got {self.num_kv_heads}"
            )
        for name in ("score_dim", "score_softcap", "logit_softcap"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, or None; got {getattr(self, name)!r}")
        self._check_positions()
        if self.score_dim == self.head_dim:
            object.__setattr__(self, "score_dim", None)

    def _check_positions(self):
        if self.windows is not None:
            if len(self.windows) != self.num_layers:
                raise ValueError(f"windows: expected one for each of {self.num_layers} layers, got {len(self.windows)}")
            if any(w is not None and w < 1 for w in self.windows):
                raise ValueError(f"windows: expected at least 1 token, or None; got {self.windows}")
            if not any(self.windows):
                object.__setattr__(self, "windows", None)
        if self.local_rope is not None and self.rope is None:
            raise ValueError("local_rope: a model with learned positions has no rotary ones")
        if self.windows is None:
            object.__setattr__(self, "local_rope", None)
        for rope in (self.rope, self.local_rope):
            if rope is not None:
                rope_frequencies(rope, self.head_dim)

    @property
    def window(self) -> int | None:
        """The common window of all layers; None where there is none or layers differ."""
        return self.windows[0] if self.windows and len(set(self.windows)) == 1 else None

    @property
    def windows_differ(self) -> bool:
        """Whether layers have different windows."""
        return self.windows is not None and len(set(self.windows)) > 1

    def replace(self, **changes) -> "CausalLMConfig":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def gpt2(
        cls, vocab_size: int = 50257, hidden_size: int = 768, num_layers: int = 12, num_heads: int = 12, **changes
    ) -> "CausalLMConfig":
        """GPT-2 (Radford et al. 2019): 124 M parameters by default; ``(50257, 1024, 24, 16)`` is "medium", 355 M."""
        fields = {
            "family": "gpt2",
            "num_kv_heads": num_heads,
            "head_dim": hidden_size // num_heads,
            "mlp_size": 4 * hidden_size,
            "max_length": 1024,
            "norm": "layer",
            "rope": None,
            "activation": "gelu_tanh",
            "gated_mlp": False,
            "fused_qkv": True,
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
            "tied": True,
        }
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            **{**fields, **changes},
        )

    @classmethod
    def llama3(cls, size: str = "8b", **changes) -> "CausalLMConfig":
        """Llama 3 (arXiv 2407.21783): ``size`` is "8b" or "70b"."""
        wide = _choose("llama3", size, {"8b": (4096, 32, 32, 14336), "70b": (8192, 80, 64, 28672)})
        return cls(**{**_decoder("llama", 128256, wide, 8, 8192, Rope(theta=500000.0)), **changes})

    @classmethod
    def mistral(cls, size: str = "7b", **changes) -> "CausalLMConfig":
        """Mistral 7B v0.1 (arXiv 2310.06825), with a window of 4096 tokens in every layer."""
        wide = _choose("mistral", size, {"7b": (4096, 32, 32, 14336)})
        fields = _decoder("mistral", 32000, wide, 8, 32768, Rope())
        return cls(**{**fields, "windows": (4096,) * changes.get("num_layers", 32), **changes})

    @classmethod
    def qwen2(cls, size: str = "7b", **changes) -> "CausalLMConfig":
        """Qwen2 (arXiv 2407.10671): ``size`` is "7b" or "0.5b"."""
        wide = _choose("qwen2", size, {"7b": (3584, 28, 28, 18944), "0.5b": (896, 24, 14, 4864)})
        vocab, kv_heads = {"7b": (152064, 4), "0.5b": (151936, 2)}[size]
        fields = _decoder("qwen2", vocab, wide, kv_heads, 131072, Rope(theta=1e6))
        return cls(**{**fields, "norm_eps": 1e-6, "qkv_bias": True, "tied": size == "0.5b", **changes})

    @classmethod
    def qwen3(cls, size: str = "8b", **changes) -> "CausalLMConfig":
        """Qwen3 (arXiv 2505.09388): ``size`` is "8b" or "0.6b"."""
        wide = _choose("qwen3", size, {"8b": (4096, 36, 32, 12288), "0.6b": (1024, 28, 16, 3072)})
        fields = _decoder("qwen3", 151936, wide, 8, 40960, Rope(theta=1e6))
        own = {"head_dim": 128, "norm_eps": 1e-6, "qk_norm": True, "tied": size == "0.6b"}
        return cls(**{**fields, **own, **changes})

    @classmethod
    def gemma2(cls, size: str = "9b", **changes) -> "CausalLMConfig":
        """Gemma 2 (arXiv 2408.00118): ``size`` is "9b" or "2b"; every other layer has a window of 4096 tokens."""
        wide = _choose("gemma2", size, {"9b": (3584, 42, 16, 14336), "2b": (2304, 26, 8, 9216)})
        fields = _decoder("gemma2", 256000, wide, {"9b": 8, "2b": 4}[size], 8192, Rope())
        windows = _every(2, 4096, changes.get("num_layers", wide[1]))
        own = {"head_dim": 256, "score_softcap": 50.0, "logit_softcap": 30.0, "windows": windows}
        return cls(**{**fields, **_GEMMA, **own, **changes})

    @classmethod
    def gemma3(cls, size: str = "1b", **changes) -> "CausalLMConfig":
        """Gemma 3 (arXiv 2503.19786), its text models: ``size`` is "1b" or "270m".

        Five of six layers have a window of 512 tokens and rotary positions of their own.
        """
        wide = _choose("gemma3", size, {"1b": (1152, 26, 4, 6912), "270m": (640, 18, 4, 2048)})
        fields = _decoder("gemma3_text", 262144, wide, 1, 32768, Rope(theta=1e6))
        windows = _every(6, 512, changes.get("num_layers", wide[1]))
        own = {"head_dim": 256, "qk_norm": True, "local_rope": Rope(), "windows": windows}
        return cls(**{**fields, **_GEMMA, **own, **changes})

    @classmethod
    def tiny(cls, vocab_size: int = 256, **changes) -> "CausalLMConfig":
        """A Llama of 0.8 M parameters and 256 positions, to be trained from scratch on a laptop."""
        fields = _decoder("llama", vocab_size, (128, 4, 4, 344), 4, 256, Rope())
        return cls(**{**fields, "tied": True, **changes})


_GEMMA = {
    "norm": "rms_offset",
    "norm_eps": 1e-6,
    "post_norms": True,
    "activation": "gelu_tanh",
    "tied": True,
    "scale_embeddings": True,
}


def _every(period: int, window: int, layers: int) -> tuple[int | None, ...]:
    """A window in all layers but each ``period``-th."""
    return tuple(window if (layer + 1) % period else None for layer in range(layers))


def _choose(family: str, size: str, sizes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    if size not in sizes:
        raise ValueError(f"size: expected one of {sorted(sizes)} for {family}, got {size!r}")
    return sizes[size]


def _decoder(family: str, vocab: int, wide: tuple[int, ...], kv_heads: int, max_length: int, rope: Rope) -> dict:
    hidden, layers, heads, mlp = wide
    return {
        "family": family,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": hidden // heads,
        "mlp_size": mlp,
        "max_length": max_length,
        "rope": rope,
    }
