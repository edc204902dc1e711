"""Methods that explain networks and their training."""

from subspace_jax.methods.records import Figure, Method

_PLANTED = "python -m pytest tests/interpret/test_safety_subspaces_figures.py"


def _planted(name: str, metric: str, at_least: float | None = None, at_most: float | None = None) -> Figure:
    return Figure(name, _PLANTED, metric, at_least=at_least, at_most=at_most, seeds=(0,))


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
        name="safety-subspaces",
        area="interpret",
        title="Subspaces of updates: alignment and fine-tuning",
        paper="Safety Subspaces are Not Distinct: A Fine-Tuning Case Study",
        arxiv=("2505.14185",),
        summary=(
            "Measures whether fine-tuning moves a model in the directions in which an earlier update, such as "
            "alignment, moved it: projects one update on the leading directions of the other or away from them, "
            "rebuilds the model, and compares subspaces of updates and activations with what random ones would give."
        ),
        module="subspace_jax.interpret.safety_subspaces",
        configs=(),
        command="subspace-jax project-update --base base --aligned chat --tuned mine --out work/projected",
        figures=(
            _planted("planted refusal, orth at 0.01: harm, worst of 3 seeds", "orth_0.01_harm_worst", at_most=0.3),
            _planted("the same, utility, worst of 3 seeds", "orth_0.01_utility_worst", at_least=0.75),
            _planted("not projected: harm, mean of 3 seeds", "mixed_harm"),
            _planted("not projected: utility", "mixed_utility"),
            _planted("same at 0.01: harm", "same_0.01_harm"),
            _planted("same at 0.01: utility", "same_0.01_utility"),
            _planted("orth at 0.25: utility", "orth_0.25_utility"),
            _planted("MSO at 0.9 of alignment and harmful updates", "mso_alignment_harmful"),
            _planted("MSO at 0.9 of useful and harmful updates", "mso_useful_harmful"),
            _planted("its random baseline", "mso_random"),
        ),
    ),
)
