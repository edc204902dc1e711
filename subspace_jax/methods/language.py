"""Language models."""

from subspace_jax.methods.records import Figure, Method

METHODS = (
    Method(
        name="tiny-llama",
        area="language",
        title="A tiny Llama from scratch",
        paper="",
        arxiv=(),
        summary=(
            "A Llama of 0.8 M parameters, trained from scratch on the bytes of the standard library's docstrings: the "
            "base model of experiments that need no download."
        ),
        module="subspace_jax.language",
        configs=("lm/tiny",),
        command="subspace-jax pretrain --config lm/tiny --workdir work/tiny",
        figures=(
            Figure(
                "validation loss, nats a byte",
                "subspace-jax pretrain --config lm/tiny",
                "loss",
                at_most=1.55,
                seeds=(0,),
            ),
        ),
    ),
)
