"""Adapters of frozen weights."""

from subspace_jax.methods.records import Figure, Method, train


def _fakes(kind: str) -> tuple[Figure, ...]:
    effort, head = (train(f"adapters/fake_digits:{variant}_{kind}") for variant in ("effort", "probe"))
    name = f"AUC on unseen kinds of fakes, trained on {kind}"
    return (
        Figure(f"{name}: Effort minus the head alone", effort, "auc", at_least=0.0, minus=head),
        Figure(f"{name}: Effort", effort, "auc"),
        Figure(f"{name}: the head alone", head, "auc"),
    )


METHODS = (
    Method(
        name="dora",
        area="adapters",
        title="DoRA, LoRA and rsLoRA",
        paper="Scaling DoRA: High-Rank Adaptation via Factored Norms and Fused Kernels",
        arxiv=("2603.22276", "2402.09353", "2106.09685", "2312.03732"),
        summary=(
            "Low-rank adapters of frozen weights.  LoRA adds a product of two small factors to a weight; DoRA also "
            "trains the norm of each of its columns, computed from the factors without forming the adapted weight.  "
            "Both are read and written in the format of Hugging Face PEFT."
        ),
        module="subspace_jax.adapters",
        configs=(
            "lm/smollm2",
            "adapters/rotated_digits",
            "adapters/rotated_images",
            "lm/tiny",
            "lm/gpt2_medium_e2e",
            "lm/large",
        ),
        command="subspace-jax train --config adapters/rotated_digits:dora --workdir work/dora",
        figures=(
            Figure(
                "test accuracy on rotated digits, DoRA",
                train("adapters/rotated_digits:dora"),
                "accuracy",
                at_least=0.92,
            ),
            Figure("the same, LoRA", train("adapters/rotated_digits:lora"), "accuracy", at_least=0.92),
            Figure("the same, rsLoRA", train("adapters/rotated_digits:rslora"), "accuracy"),
            Figure("the same, the head alone", train("adapters/rotated_digits:head"), "accuracy"),
        ),
    ),
    Method(
        name="flora",
        area="adapters",
        title="FLoRA",
        paper="FLoRA: Low-Rank Core Space for N-dimension",
        arxiv=("2405.14739",),
        summary=(
            "Adapters for weights with any number of axes, convolutions above all: a small core tensor and one factor "
            "for each axis, as in a Tucker decomposition, instead of a flattened low-rank matrix."
        ),
        module="subspace_jax.adapters",
        configs=("adapters/rotated_images",),
        command="subspace-jax train --config adapters/rotated_images:resnet_flora --workdir work/flora",
        figures=(
            Figure(
                "test accuracy of a ConvNet on rotated digits, FLoRA minus LoRA of its size, 5 seeds",
                "python -m pytest -m slow tests/adapters/test_flora_digits.py",
                "flora_minus_lora",
                at_least=0.0,
                seeds=(0,),
            ),
            Figure(
                "the same, FLoRA",
                "python -m pytest -m slow tests/adapters/test_flora_digits.py",
                "flora",
                at_least=0.94,
                seeds=(0,),
            ),
        ),
    ),
    Method(
        name="svfit",
        area="adapters",
        title="SVFit",
        paper="SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
        arxiv=("2409.05926",),
        summary=(
            "An adapter that trains the leading singular values of a frozen weight and keeps its singular vectors: "
            "the adapter with the fewest parameters of all."
        ),
        module="subspace_jax.adapters",
        configs=("adapters/rotated_digits",),
        command="subspace-jax train --config adapters/rotated_digits:svfit --workdir work/svfit",
        figures=(
            Figure(
                "test accuracy on rotated digits, 192 parameters",
                train("adapters/rotated_digits:svfit"),
                "accuracy",
                at_least=0.85,
            ),
            Figure(
                "the same, with the linear head",
                train("adapters/rotated_digits:svfit_head"),
                "accuracy",
                at_least=0.95,
            ),
            Figure("the same, the head alone", train("adapters/rotated_digits:head"), "accuracy"),
        ),
    ),
    Method(
        name="effort",
        area="adapters",
        title="Effort",
        paper="Effort: Efficient Orthogonal Modeling for Generalizable AI-Generated Image Detection",
        arxiv=("2411.15633",),
        summary=(
            "An adapter that freezes the principal singular triplets of a weight and trains the few last ones, in "
            "their orthogonal complement.  It detects generated images of kinds that the training never showed."
        ),
        module="subspace_jax.adapters",
        configs=("adapters/fake_digits",),
        command="subspace-jax train --config adapters/fake_digits:effort_blur --workdir work/fakes",
        figures=(*_fakes("blur"), *_fakes("pca")),
    ),
)
