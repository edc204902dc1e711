"""Builds adapters from the fields of a config."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from subspace_jax import adapters
from subspace_jax.adapters.api import adapted_weights
from subspace_jax.nn import CausalLMConfig, param_shapes
from subspace_jax.train.fields import check_choice

METHODS = ("lora", "rslora", "dora", "flora", "svfit", "effort")
BASE_DTYPES = ("float32", "bfloat16", "int8")
_RULE = re.compile(r"(?P<rule>.+?)(?:=(?P<rank>\d+(?:x\d+)*)(?::(?P<alpha>\d+(?:\.\d+)?))?)?")
_RATES = {"lora": 2e-4, "rslora": 2e-4, "dora": 2e-4, "flora": 2e-4, "svfit": 2e-3, "effort": 2e-4}


def default_adapter() -> ConfigDict:
    """Returns the fields ``adapter`` of a config, for :func:`adapter_settings`.

    ``method`` is "lora", "rslora", "dora", "flora", "svfit", "effort", or empty for none.  ``target_modules`` lists
    globs of weights, separated by commas, such as ``"attn/q,attn/v"``; for a language model also names of PEFT,
    ``"q_proj,v_proj"`` or ``"all-linear"``.  ``attn/q=16`` sets the rank of a rule, ``attn/q=16:32`` its alpha too,
    ``conv1=8x8x3x3`` one rank for each axis (FLoRA).  Empty means the default of the task.  ``modules_to_save`` lists
    parameters that are trained in full, in the same way.

    ``rank`` 0 means 8 for LoRA, DoRA and FLoRA, all singular values for SVFit, and one triplet for Effort.  ``alpha`` 0
    means twice the rank; for FLoRA ``alpha`` is the scale, and 0 means 1.  ``init`` (empty: the default of the method)
    and ``dropout`` apply to LoRA, DoRA and FLoRA, ``param`` to SVFit, ``window`` and ``groups`` to LoRA and DoRA on
    convolutions.

    ``base_dtype`` is the dtype of a language model's frozen weights: "float32", "bfloat16", or "int8" for the matrices
    of its layers, see :func:`subspace_jax.adapters.quantize`.
    """
    return ConfigDict(
        {
            "method": "",
            "target_modules": "",
            "modules_to_save": "",
            "rank": 0,
            "alpha": 0.0,
            "init": "",
            "param": "linear",
            "dropout": 0.0,
            "window": 0,
            "groups": 1,
            "base_dtype": "float32",
        }
    )


def adapter_settings(
    config: ConfigDict, default_rules: Sequence[str], model: CausalLMConfig | None = None
) -> dict[str, Any]:
    """Returns the adapter configs that the fields of :func:`default_adapter` describe.

    Args:
      config: The fields.
      default_rules: Rules that ``method`` adapts where ``target_modules`` is empty.
      model: A language model: names of its modules in PEFT are read, and rules have to match weights of it.

    Returns:
      Rule to adapter config, for :func:`subspace_jax.adapters.prepare`; empty where neither ``method`` nor
      ``modules_to_save`` is set.

    Raises:
      ValueError: The method is unknown, or a field is invalid; a message about a rule names its field.
    """
    if config.method:
        _check_method(config.method)
    elif config.target_modules:
        raise ValueError(
            f"adapter.target_modules: {config.target_modules!r} without adapter.method; expected one of {METHODS} there"
        )
    check_choice("adapter.base_dtype", config.base_dtype, BASE_DTYPES)
    if config.rank < 0 or config.alpha < 0:
        raise ValueError(f"adapter.rank, adapter.alpha: expected at least 0, got {config.rank} and {config.alpha}")
    rules = _split(config.modules_to_save)
    settings: dict[str, Any] = {
        rule: adapters.Full() for text in rules for rule in _rules_of("adapter.modules_to_save", text, model)
    }
    _check_rules("adapter.modules_to_save", settings, model)
    for text in (_split(config.target_modules) or default_rules) if config.method else ():
        found = _RULE.fullmatch(text)
        ranks = tuple(map(int, found["rank"].split("x"))) if found["rank"] else (config.rank,)
        alpha = float(found["alpha"] or config.alpha)
        rules = _rules_of("adapter.target_modules", found["rule"], model)
        if not (left := [rule for rule in rules if rule not in settings]):
            raise ValueError(f"adapter.target_modules: {found['rule']!r} is named twice")
        try:
            settings |= dict.fromkeys(left, _setting(config, ranks, alpha))
        except ValueError as error:
            raise ValueError(f"adapter.{error}") from error
    _check_rules("adapter.target_modules", settings, model)
    return settings


def _rules_of(field: str, text: str, model: CausalLMConfig | None) -> list[str]:
    """Returns the rules that a name of PEFT stands for; any other text is a rule itself."""
    if model is None:
        return [text]
    from subspace_jax import interop  # which is large, and only for language models

    try:
        return interop.target_rules(model, text) or [text]
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def _check_rules(field: str, settings: Mapping[str, Any], model: CausalLMConfig | None) -> None:
    if model is None or not settings:
        return
    from subspace_jax import interop

    try:
        adapted_weights(param_shapes(model), settings, name=field)
    except ValueError as error:
        raise ValueError(f"{error}; PEFT's names are {', '.join(interop.target_names(model))}") from error


def adapter_recipe(method: str) -> dict[str, Any]:
    """Returns the default fields of ``optim`` for adapters of a language model.

    AdamW without weight decay.  LoRA and DoRA use 2e-4 with a linear schedule (arXiv 2402.09353, appendix: 1e-4 to
    3e-4 after 100 steps of warm-up; set the warm-up in the config, as it depends on the length of the run), SVFit ten
    times that, Effort a constant 2e-4, as released.

    Raises:
      ValueError: The method is unknown.
    """
    _check_method(method)
    schedule = "constant" if method == "effort" else "linear"
    return {"name": "adamw", "learning_rate": _RATES[method], "schedule": schedule, "kwargs.weight_decay": 0.0}


def _check_method(method: str) -> None:
    check_choice("adapter.method", method, METHODS)


def _setting(config: ConfigDict, ranks: tuple[int, ...], alpha: float) -> Any:
    method = config.method
    if method in ("svfit", "effort") and config.dropout:
        raise ValueError(f"dropout: {method!r} has none, got {config.dropout}")
    if method not in ("lora", "rslora", "dora") and (config.window or config.groups != 1):
        raise ValueError(
            f"window, groups: of LoRA and DoRA, got {config.window} and {config.groups} for {method!r}"
            + ("; name a rank for each axis, as in conv1=8x8x3x3" if method == "flora" else "")
        )
    if method == "flora":
        ranks = ranks if len(ranks) > 1 else (ranks[0] or 8,) * 2
        init = {"init": config.init} if config.init else {}
        return adapters.FLoRA(ranks, alpha or 1.0, dropout=config.dropout, **init)
    if len(ranks) > 1:
        raise ValueError(f"target_modules: one rank for each axis is for 'flora', got {ranks} for {method!r}")
    rank = ranks[0]
    if method == "svfit":
        return adapters.SVFit(rank or None, config.param)
    if method == "effort":
        return adapters.Effort(rank or 1)
    rank = rank or 8
    fields = {name: config[name] for name in ("dropout", "window", "groups")}
    fields["init"] = config.init or "kaiming"
    if method == "dora":
        return adapters.DoRA(rank, alpha or 2.0 * rank, **fields)
    return adapters.LoRA(rank, alpha or 2.0 * rank, rslora=method == "rslora", **fields)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
