"""Language models."""

from subspace_jax.methods.records import Figure, Method


def _smollm2(variant: str) -> str:
    return f"subspace-jax finetune --config lm/smollm2:{variant}"


def _after_over_before(name: str, variant: str, seeds: tuple[int, ...] = (0,)) -> Figure:
    title = f"validation loss after 60 steps of {name}, over that before"
    return Figure(title, _smollm2(variant), "loss", at_most=0.99, seeds=seeds, over=_smollm2("base"))


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
    Method(
        name="smollm2",
        area="language",
        title="SmolLM2, fine-tuned by adapters",
        paper="",
        arxiv=(),
        summary=(
            "SmolLM2-135M-Instruct, fine-tuned by LoRA, DoRA, LoRA-RITE and AdaPreLoRA on the docstrings of the "
            "standard library: adapters on a real model that needs no hub."
        ),
        module="subspace_jax.language",
        configs=("lm/smollm2",),
        command="subspace-jax finetune --config lm/smollm2:lora --workdir work/smollm2",
        figures=(
            _after_over_before("LoRA", "lora", seeds=(0, 1, 2)),
            _after_over_before("DoRA", "dora"),
            _after_over_before("LoRA by LoRA-RITE", "lora_rite"),
            _after_over_before("LoRA by AdaPreLoRA", "adaprelora"),
        ),
        needs=("smollm2",),
    ),
)
