"""Methods that explain networks and their training."""

from subspace_jax.methods.records import Figure, Method

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
)
