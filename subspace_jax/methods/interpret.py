"""Methods that explain networks and their training."""

from subspace_jax.methods.records import Figure, Method

_PICTURES = "python -m pytest tests/interpret/test_compositional_pictures.py"

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
        name="compositional-linear",
        area="interpret",
        title="Compositional representations",
        paper="Compositional Generalization Requires Linear, Orthogonal Representations in Vision Embedding Models",
        arxiv=("2602.24264", "2302.14383"),
        summary=(
            "Measures how far embeddings are from the form that compositional generalisation needs: a sum of one "
            "vector per concept value, orthogonal across concepts, each concept of low rank; and how well linear "
            "probes do on combinations of values that they never saw."
        ),
        module="subspace_jax.interpret.compositional_linear",
        configs=(),
        command="subspace-jax compositional --features features.npz --labels labels.csv --out work/compositional",
        figures=(
            Figure(
                "rank correlation of projected R2 with accuracy on new combinations, seven representations of pictures",
                _PICTURES,
                "spearman",
                at_least=0.8,
                seeds=(0,),
            ),
            Figure("projected R2 of ideal factors with noise", _PICTURES, "ideal_r2", at_least=0.95, seeds=(0,)),
            Figure("their accuracy on new combinations", _PICTURES, "ideal_accuracy", at_least=0.95, seeds=(0,)),
            Figure("accuracy of a supervised network's features", _PICTURES, "supervised_accuracy", seeds=(0,)),
            Figure("accuracy of pixels", _PICTURES, "pixels_accuracy", seeds=(0,)),
            Figure("accuracy of five random layers", _PICTURES, "random5_accuracy", seeds=(0,)),
        ),
    ),
)
