"""Optimizers."""

from subspace_jax.methods.records import Figure, Method, golden, train


def _adaprelora(variant: str, rank: int) -> str:
    return train(f"optim/low_rank_regression:{variant} --config.model.rank={rank}")


def _tiny_gpt(variant: str) -> str:
    return f"subspace-jax pretrain --config optim/tiny_gpt:{variant}"


def _over_adamw(name: str, variant: str, at_most: float | None = None) -> Figure:
    command, adamw = _tiny_gpt(variant), _tiny_gpt("adamw")
    return Figure(f"{name}: loss over AdamW's", command, "loss", at_most=at_most, seeds=(0,), over=adamw)


METHODS = (
    Method(
        name="adaprelora",
        area="optim",
        title="AdaPreLoRA, and optimizers of LoRA's factors",
        paper="AdaPreLoRA: Adafactor Preconditioned Low-Rank Adaptation",
        arxiv=("2605.08734", "2410.20625", "2407.18242", "2402.12354", "2402.02347"),
        summary=(
            "An optimizer of the two factors of LoRA whose step is the reachable one closest to Adafactor's step of "
            "the whole weight.  Beside it: LoRA-RITE, LoRA-Pro, LoRA+, and scaled gradient descent and AdamW "
            "(Riemannian preconditioned LoRA)."
        ),
        module="subspace_jax.optim",
        configs=("optim/low_rank_regression", "optim/tiny_e2e", "lm/smollm2"),
        command="subspace-jax train --config optim/low_rank_regression:adaprelora --workdir work/adaprelora",
        figures=(
            Figure(
                "relative loss of low-rank regression, rank 4",
                _adaprelora("adaprelora", 4),
                "relative",
                at_most=1e-8,
                seeds=(0, 1, 2, 3, 4),
                reduce="median",
            ),
            Figure(
                "the same, rank 8",
                _adaprelora("adaprelora", 8),
                "relative",
                at_most=1e-5,
                seeds=(0, 1, 2, 3, 4),
                reduce="median",
            ),
            Figure(
                "the same, rank 8, over scaled AdamW's",
                _adaprelora("adaprelora", 8),
                "relative",
                at_most=0.01,
                seeds=(0, 1, 2, 3, 4),
                reduce="median",
                over=_adaprelora("scaled_adamw_lora", 8),
            ),
            golden("tests/optim/test_lora_golden.py"),
        ),
    ),
    Method(
        name="coso",
        area="optim",
        title="CoSO, GaLore, Fira, APOLLO, Online Subspace Descent and GPM",
        paper="CoSO: Continuous Subspace Optimization for Continual Learning",
        arxiv=("2505.11816", "2403.03507", "2410.01623", "2412.05270", "2408.12857", "2103.09762"),
        summary=(
            "Optimizers that step in a low-rank subspace of the gradient and keep their moments there, around any "
            "Optax transform.  CoSO keeps the updates of a stream of tasks orthogonal to the directions that earlier "
            "tasks used, as gradient projection memory (GPM) does; the others save memory."
        ),
        module="subspace_jax.optim",
        configs=("optim/tiny_gpt",),
        command="subspace-jax pretrain --config optim/tiny_gpt:galore --workdir work/galore",
        figures=(
            _over_adamw("tiny language model, 600 steps, GaLore", "galore", 1.05),
            _over_adamw("the same, CoSO", "coso", 1.05),
            _over_adamw("the same, Fira", "fira"),
            _over_adamw("the same, Online Subspace Descent", "online_subspace_descent"),
            _over_adamw("the same, APOLLO", "apollo"),
            golden("tests/optim/test_projection_golden.py", "tests/optim/test_coso.py"),
        ),
    ),
)
