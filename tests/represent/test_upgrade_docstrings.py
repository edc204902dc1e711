"""``subspace-jax upgrade`` on vectors of the standard library's docstrings: from WordLlama's to MiniLM's."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg, metrics, represent
from subspace_jax.cli.main import main
from subspace_jax.data import text
from subspace_jax.represent.lambda_orthogonality import predict

pytestmark = pytest.mark.slow

MODELS = pathlib.Path(__file__).parents[2] / "work" / "models"
COUNT, K = 2000, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Vectors of 2,000 docstrings by both models, half of them to fit to, and the upgrade."""
    root, docstrings = tmp_path_factory.mktemp("docstrings"), text.docstrings()
    chosen = np.random.default_rng(0).permutation(len(docstrings))[:COUNT]
    for name, model in (("old", "wordllama"), ("new", "minilm")):
        if not (MODELS / model).is_dir():
            pytest.skip(f"needs `subspace-jax fetch {model}`")
        opened = represent.open_text_model(MODELS / model)
        found = represent.features_of_texts(opened, [docstrings[i] for i in chosen]).features
        np.save(root / f"{name}.npy", found[: COUNT // 2])
        np.save(root / f"held_{name}.npy", found[COUNT // 2 :])
    files = [f"--{name}={root / name}.npy" for name in ("old", "new")]
    files += ["--gallery", f"{root / 'held_old.npy'}", "--out", f"{root / 'up'}"]
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        assert main(["upgrade", "--quiet", *files]) == 0
    return root


def test_an_upgrade_finds_what_the_new_model_finds_and_says_so_before(folder, record_property):
    fit_old, fit_new, old, new = (linalg.unit_vectors(np.load(folder / f"{name}.npy")) for name in (
        "old", "new", "held_old", "held_new",
    ))  # fmt: skip
    own = jnp.arange(len(new))
    _, truth = linalg.nearest_rows(new, new, K, exclude=own)

    @jax.jit
    def recall(gallery):
        return predict.neighbour_recall(new, linalg.unit_vectors(gallery), truth, own)

    mapped = jnp.asarray(np.load(folder / "up" / "gallery.npy"))
    plain = [np.linalg.lstsq(x, np.asarray(fit_new))[0] for x in (np.asarray(fit_old), with_one(fit_old))]
    squares = max(recall(jnp.asarray(x @ kernel)) for x, kernel in zip((old, with_one(old)), plain, strict=True))
    unmapped = recall(jnp.pad(old, ((0, 0), (0, new.shape[1] - old.shape[1]))))

    said = json.loads((folder / "up" / "upgrade.json").read_text())["prediction"]
    shares = jnp.asarray(said["shares"])
    order = jnp.asarray(np.load(folder / "up" / "order.npy"), jnp.int32)
    random = jax.random.permutation(jax.random.key(0), len(new)).astype(jnp.int32)
    curve = jax.jit(lambda order: metrics.backfill_curve(recall, mapped, new, order, shares))
    (values, area), (_, random_area) = curve(order), curve(random)
    error = float(np.max(np.abs(np.asarray(values) - said["curves"][said["order"]])))
    found = {
        "mapped": recall(mapped),
        "mapped_over_least_squares": recall(mapped) / squares,
        "mapped_minus_unmapped": recall(mapped) - unmapped,
        "area": area,
        "area_minus_random": area - random_area,
        "curve_error": error,
    }
    for name, value in found.items():
        record_property(name, float(value))
    assert found["mapped_over_least_squares"] >= 0.95
    assert found["mapped_minus_unmapped"] >= 0.1
    assert area > random_area
    assert error <= 0.02


def with_one(x):
    return np.concatenate([np.asarray(x), np.ones((len(x), 1), np.float32)], axis=1)


def test_a_chain_of_upgrades_costs_what_its_links_cost(folder, tmp_path, record_property):
    """From half the axes of WordLlama's vectors over all of them to MiniLM's."""
    for name in ("old", "held_old"):
        np.save(tmp_path / f"{name}.npy", np.load(folder / f"{name}.npy")[:, :128])
    first = [f"--old={tmp_path / 'old.npy'}", f"--new={folder / 'old.npy'}", f"--out={tmp_path / 'first'}"]
    check = [f"{tmp_path / 'held_old.npy'}", *(f"{folder / name}.npy" for name in ("held_old", "held_new"))]
    chain = ["--maps", f"{tmp_path / 'first'}", f"{folder / 'up'}", "--check", *check, "--out", f"{tmp_path / 'both'}"]
    with jax.numpy_dtype_promotion("standard"):
        assert main(["upgrade", "--quiet", *first]) == 0
        assert main(["upgrade", "--quiet", *chain]) == 0
    one, two = json.loads((tmp_path / "both" / "upgrade.json").read_text())["check"]
    record_property("chain", one["from_here"])
    assert one["cost"] > 0
    assert one["cost"] + two["cost"] == pytest.approx(1 - one["from_here"])
    assert 0.1 < one["from_here"] < two["from_here"]
