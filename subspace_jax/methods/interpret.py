"""Methods that explain networks and their training."""

from subspace_jax.methods.records import Figure, Method


def _aligned(name: str, part: str, metric: str, at_least: float | None = None) -> Figure:
    command = f"python -m pytest tests/interpret/test_platos_cave_3d_figures.py -k {part}"
    return Figure(name, command, metric, at_least=at_least, seeds=(0,))


METHODS = (
    Method(
        name="intrinsic-dimension",
        area="interpret",
        title="Intrinsic dimension of an objective landscape",
        paper="Measuring the Intrinsic Dimension of Objective Landscapes",
        arxiv=("1804.08838", "2012.13255"),
        summary=(
            "Trains a network inside random subspaces of its parameters, of growing dimension, and finds the smallest "
            "that solves the task: its intrinsic dimension.  The trained vector and a random key are an exact "
            "compression of the network."
        ),
        module="subspace_jax.interpret.intrinsic_dimension",
        configs=("optim/intrinsic_digits", "optim/intrinsic_mnist"),
        command="subspace-jax intrinsic-dimension --config optim/intrinsic_digits --workdir work/digits_dim",
        figures=(
            Figure(
                "d_int90 of a digits network of 4810 parameters, two runs of each dimension",
                "subspace-jax intrinsic-dimension --config optim/intrinsic_digits",
                "d_int90",
                at_least=100,
                at_most=170,
                seeds=(0,),
            ),
        ),
    ),
    Method(
        name="platos-cave-3d",
        area="interpret",
        title="Alignment of two feature spaces in a subspace",
        paper="Escaping Plato's Cave: Towards the Alignment of 3D and Text Latent Spaces",
        arxiv=("2503.05283", "2401.05224", "2405.07987"),
        summary=(
            "Finds low-dimensional subspaces in which the features of two frozen encoders, of shapes and of texts say, "
            "are correlated, by CCA of some known pairs, aligns them there by an affine map or by local CKA, and "
            "matches or retrieves unseen items of one with those of the other.  It takes any two paired feature "
            "matrices."
        ),
        module="subspace_jax.interpret.platos_cave_3d",
        configs=(),
        command="subspace-jax align --x images.npy --y captions.npy --out work/align",
        figures=(
            _aligned("halves of digits, 3 draws: top-5 retrieval in 50 directions", "digit", "k50_top_5", 0.5),
            _aligned("the same over that with all features", "digit", "top_5_over_full", 1.3),
            _aligned("the same with all features", "digit", "k50_full_top_5"),
            _aligned("the same in 5 directions", "digit", "k5_top_5"),
            _aligned("the same in 50 directions by local CKA", "digit", "local_cka_top_5"),
            _aligned("the same with all features by local CKA", "digit", "local_cka_full_top_5"),
            _aligned("matching in 50 directions", "digit", "k50_matching"),
            _aligned("matching with all features", "digit", "k50_full_matching"),
            _aligned(
                "WordLlama finds MiniLM, 300 anchors: top-1 in 50 directions", "docstrings", "anchors300_top_1", 0.7
            ),
            _aligned("the same with all features", "docstrings", "anchors300_full_top_1"),
            _aligned("the same, 1,600 anchors", "docstrings", "anchors1600_top_1"),
            _aligned("the same with all features, 1,600 anchors", "docstrings", "anchors1600_full_top_1"),
            _aligned(
                "correlation of distances of descriptions with Chamfer distances", "descriptions", "chamfer_before"
            ),
            _aligned("the same in the subspace", "descriptions", "chamfer_after"),
        ),
        needs=("wordllama", "minilm"),
    ),
)
