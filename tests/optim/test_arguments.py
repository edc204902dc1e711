"""Arguments of every transform are checked where it is made, and named; what is traced passes."""

import inspect

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import optim

# What a transform cannot do without.
NEEDED = {
    "add_lambda_orthogonality": {"weight": 1.0, "lam": 1.0},
    "low_rank_projection": {"inner": optax.sgd(0.1), "rank": 2},
    "quantize_state": {"inner": optax.adam(0.1), "dtype": "int8"},
    "with_geometry": {"euclidean_tx": optax.sgd(0.1), "grassmann_tx": optax.sgd(0.1)},
    "project_out": {"bases": None},
    "project_gradient": {"bases": None},
    "gradient_projection_memory": {"learning_rate": 0.1, "bases": None},
    "scale_by_riemannian_sgd": {"step_size": 0.1},
    "scale_by_riemannian_adam": {"step_size": 0.1},
}
# Arguments whose fields count as arguments.
GROUPS = {
    "scale_by_adaprelora": ("options", optim.AdaPreLoRAOptions),
    "scale_by_lora_rite": ("options", optim.LoRARITEOptions),
    "scale_by_lora_pro": ("options", optim.LoRAProOptions),
    **dict.fromkeys(("low_rank_projection", "scale_by_galore"), ("projection", optim.ProjectionOptions)),
}
TRANSFORMS = [
    name
    for name in optim.__all__
    if inspect.isfunction(f := getattr(optim, name)) and "Transformation" in str(inspect.signature(f).return_annotation)
]
SHARES = ("b1", "b2", "momentum", "dampening")
AT_LEAST_0 = (
    *("eps", "weight_decay", "lr_factor", "relative_rate", "embedding_rate", "reg", "delta", "decay"),
    *("damping_rel", "damping_abs", "eps_rel", "weight", "lam"),
)
ABOVE_0 = ("ratio", "clip_rms", "clip_norm", "skip_rms", "update_cap", "kappa")
INTEGERS = ("rank", "refresh_every", "rounds", "proj_rank", "sketch_rank", "max_history")
NONE_MEANS_OFF = ("b1", "momentum", "max_history", "embedding_rate", "clip_rms", "clip_norm", "skip_rms", "update_cap")

CASES = [
    *((name, value) for name in SHARES for value in (-0.1, 1.0, float("nan"), np.float32(1.5))),
    *((name, value) for name in AT_LEAST_0 for value in (-1e-9, float("inf"), float("nan"), 1e300)),
    *((name, value) for name in ABOVE_0 for value in (0.0, -1.0, float("nan"))),
    *((name, value) for name in INTEGERS for value in (0, -1)),
    *(("scale", value) for value in (-1.0, float("nan"), float("inf"), 1e300)),
    *((name, value) for name in ("learning_rate", "step_size") for value in (float("nan"), float("inf"), 1e300)),
    *(("reorth_every", value) for value in (0, float("nan"))),
]
WRONG_TYPES = [
    *((name, "0.9") for name in (*SHARES, *AT_LEAST_0, *ABOVE_0, "learning_rate", "step_size")),
    *((name, True) for name in ("b2", "eps", "weight_decay")),
    *((name, 1.5) for name in INTEGERS),
    *((name, "adam") for name in ("inner", "fallback")),
    *((name, 3) for name in ("pairs", "weight_dimension_numbers")),
]


def make(public, **options):
    signature = inspect.signature(getattr(optim, public))
    needed = NEEDED.get(public, {})
    if "learning_rate" in signature.parameters:
        needed = {"learning_rate": 0.1, **needed}
    if public in GROUPS:
        group, kind = GROUPS[public]
        needed = {**needed, group: kind(**{name: options.pop(name) for name in kind._fields if name in options})}
    return getattr(optim, public)(**{**needed, **options})


def parameters_of(public):
    found = set(inspect.signature(getattr(optim, public)).parameters)
    return found | set(GROUPS[public][1]._fields) if public in GROUPS else found


def those_with(name):
    """Names of the transforms that have an argument."""
    found = [public for public in TRANSFORMS if name in parameters_of(public)]
    assert found, name
    return found


@pytest.mark.parametrize(("name", "value"), CASES, ids=str)
def test_a_number_out_of_range_is_named(name, value):
    for public in those_with(name):
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
            make(public, **{name: value})


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=str)
def test_an_argument_of_another_type_is_named(name, value):
    for public in those_with(name):
        with pytest.raises(TypeError, match=rf"^{name}: expected .*, got "):
            make(public, **{name: value})


@pytest.mark.parametrize("public", TRANSFORMS)
def test_arrays_schedules_and_the_ends_of_ranges_pass(public):
    parameters = parameters_of(public)
    make(public)
    for name in parameters:
        if name in (*SHARES, *AT_LEAST_0, *ABOVE_0, "learning_rate", "step_size", "scale"):
            make(public, **{name: jnp.asarray(0.5)})
            make(public, **{name: np.float32(0.5)})
        if name in (*SHARES, *AT_LEAST_0):
            make(public, **{name: 0})
        if name in ("learning_rate", "step_size", "relative_rate", "embedding_rate"):
            make(public, **{name: lambda count: 0.1})
        if name in NONE_MEANS_OFF and name in parameters and not (name == "b1" and "adaprelora" not in public):
            make(public, **{name: None})
