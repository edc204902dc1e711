"""Methods that explain networks and their training."""

from subspace_jax.methods.records import Figure, Method, golden

_HEADS = "python -m pytest tests/interpret/test_attention_ssm_figures.py"
_OPERATORS = "subspace-jax attention-operators --model work/models/smollm2"

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
        name="attention-ssm",
        area="interpret",
        title="Attention and state-space layers as heads",
        paper="How Many Heads Make an SSM? A Unified Framework for Attention and State Space Models",
        arxiv=("2512.15115",),
        summary=(
            "Writes a sequence layer as operators between pairs of tokens, counts the heads that it needs, turns a "
            "linear state-space layer into exactly that many, and measures how gradients travel with distance.  It "
            "says how many of its heads each attention layer of a language model uses."
        ),
        module="subspace_jax.interpret.attention_ssm",
        configs=(),
        command="subspace-jax attention-operators --model work/models/smollm2 --out work/operators",
        figures=(
            Figure(
                "largest relative error of the heads of a layer with 8 decays, float64, three layers",
                _HEADS,
                "heads_error",
                at_most=1e-10,
                seeds=(0,),
            ),
            Figure(
                "error of 1 to 8 heads minus the tail of the singular values, largest",
                _HEADS,
                "tail_error",
                at_most=1e-10,
                seeds=(0,),
            ),
            Figure(
                "slope of the logarithm of the gradient over that of the spectral radius, minus 1, largest",
                _HEADS,
                "largest_slope_error",
                at_most=0.05,
                seeds=(0,),
            ),
            Figure(
                "gradient on highway inputs, largest over smallest of all distances",
                _HEADS,
                "highway_ratio",
                at_most=1.05,
                seeds=(0,),
            ),
            Figure("the same layers, smallest error of 7 heads", _HEADS, "error_with_one_head_less", seeds=(0,)),
            golden("tests/interpret/test_attention_ssm.py", "tests/interpret/test_attention_ssm_attention.py"),
            Figure(
                "SmolLM2: smallest interaction rank of a layer, over its heads",
                _OPERATORS,
                "rank_over_heads",
                at_least=1.0,
                seeds=(0,),
            ),
            Figure("the same, effective rank, mean of 30 layers of 9 heads", _OPERATORS, "effective_rank", seeds=(0,)),
            Figure("the same, error of the best 5 heads, mean", _OPERATORS, "half_error", seeds=(0,)),
        ),
        needs=("smollm2",),
    ),
)
