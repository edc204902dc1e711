"""Methods that learn and measure representations."""

from subspace_jax.methods.records import Figure, Method, train

_SHIFTED_DIGITS = "python -m pytest tests/represent/test_few_shot_figures.py -k digits"
_DOCSTRINGS_BY_MODULE = "python -m pytest tests/represent/test_few_shot_figures.py -k docstring"


def _few_shot(name: str, command: str, metric: str, at_least: float | None = None) -> Figure:
    return Figure(name, command, metric, at_least=at_least, seeds=(0,))


def _mixture(variant: str) -> str:
    return train(f"represent/decoupling_synthetic:{variant}")


def _decoupled(weight: str, variant: str) -> tuple[Figure, Figure]:
    return (
        Figure(
            f"probe accuracy on a mixture of domains, weight {weight}, minus none",
            _mixture(variant),
            "domains/probe_accuracy",
            at_most=-0.2,
            minus=_mixture("none"),
        ),
        Figure(f"task accuracy on the mixture, weight {weight}", _mixture(variant), "accuracy", at_least=0.98),
    )


def _weighted(weight: str, variant: str, other: str, at_most: float | None = None) -> Figure:
    return Figure(
        f"accuracy of a probe that weighs both kinds the same, weight {weight}, minus {other}",
        _mixture(variant),
        "domains/weighted_probe_accuracy",
        at_most=at_most,
        minus=_mixture(other),
    )


def _of_dialects(name: str, metric: str, at_most: float) -> Figure:
    weighted, plain = (
        f"subspace-jax finetune --config represent/decoupling_dialects:smollm2_{variant}" for variant in ("l01", "none")
    )
    name = f"{name} of SmolLM2 on dialects of Spanish, weight 0.1, minus none"
    return Figure(name, weighted, metric, at_most=at_most, seeds=(0, 1), minus=plain)


_SPRITES = train("represent/sprites")
_VAE = train("represent/sprites:vae")
_DOCSTRINGS = "python -m pytest tests/represent/test_upgrade_docstrings.py"


def _digits(variant: str) -> str:
    return train(f"represent/compatible_digits:{variant}")


METHODS = (
    Method(
        name="gcr",
        area="represent",
        title="Grassmann class representation",
        paper="Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann Class Representation",
        arxiv=("2308.01547",),
        summary=(
            "A classification head that keeps a linear subspace for each class, a point of the Grassmann manifold, "
            "instead of a weight vector.  It replaces the last layer of a classifier and its optimizer, and gives "
            "features that vary more within a class and transfer better."
        ),
        module="subspace_jax.represent.gcr",
        configs=(
            "gcr/digits",
            "gcr/synthetic",
            "gcr/digits_resnet",
            "gcr/cifar10",
            "gcr/imagenet_resnet",
            "gcr/imagenet_rsb",
            "gcr/imagenet_vgg",
            "gcr/imagenet_swin",
            "gcr/imagenet_deit3",
        ),
        command="subspace-jax train --config gcr/digits:k8 --workdir work/digits_k8",
        figures=(
            Figure("test accuracy on digits, k = 8", train("gcr/digits:k8"), "accuracy", at_least=0.97),
            Figure("the same, k = 1", train("gcr/digits:k1"), "accuracy"),
            Figure("the same, cosine head", train("gcr/digits:cosine"), "accuracy"),
            Figure("the same, softmax head", train("gcr/digits:softmax"), "accuracy"),
            Figure("test accuracy on random subspaces, k = 4", train("gcr/synthetic:k4"), "accuracy", at_least=0.94),
            Figure("the same, k = 1", train("gcr/synthetic:k1"), "accuracy"),
            Figure("the same, softmax head", train("gcr/synthetic:softmax"), "accuracy"),
            Figure(
                "the same, k = 4 minus k = 1",
                train("gcr/synthetic:k4"),
                "accuracy",
                at_least=0.25,
                minus=train("gcr/synthetic:k1"),
            ),
            Figure("test accuracy of ResNet-18-D on digits, k = 8", train("gcr/digits_resnet:k8"), "accuracy"),
            Figure("the same, softmax head", train("gcr/digits_resnet:softmax"), "accuracy"),
            Figure(
                "the same, k = 8 minus softmax",
                train("gcr/digits_resnet:k8"),
                "accuracy",
                at_least=-0.005,
                minus=train("gcr/digits_resnet:softmax"),
            ),
        ),
    ),
    Method(
        name="hydra",
        area="represent",
        title="Hydra: arbitrary pairs in gated subspaces",
        paper="Rethinking Positive Pairs in Contrastive Learning",
        arxiv=("2410.18200",),
        summary=(
            "Contrastive learning in which any two classes may form a positive pair.  A gate selects, for each pair of "
            "classes, the dimensions in which their examples are alike and differ from all others.  It is thrown away "
            "after training; the features transfer, and the gates tell which classes are related."
        ),
        module="subspace_jax.represent.hydra",
        configs=("represent/hydra_digits", "represent/hydra_mnist"),
        command="subspace-jax train --config represent/hydra_digits:distinct --workdir work/hydra",
        figures=(
            Figure(
                "1-NN accuracy of projections of digits, pairs of distinct classes",
                train("represent/hydra_digits:distinct"),
                "features/nearest_accuracy",
                at_least=0.97,
            ),
            Figure(
                "the same, minus that without a gate",
                train("represent/hydra_digits:distinct"),
                "features/nearest_accuracy",
                at_least=0.05,
                minus=train("represent/hydra_digits:distinct_open"),
            ),
            Figure(
                "loss of pairs at the end of training",
                train("represent/hydra_digits:distinct"),
                "pair_loss",
                at_most=1.0,
            ),
            Figure(
                "standard deviation of the gates", train("represent/hydra_digits:distinct"), "gates/std", at_least=0.3
            ),
            Figure("linear probe on features", train("represent/hydra_digits:distinct"), "features/probe_accuracy"),
            Figure(
                "the same, without a gate", train("represent/hydra_digits:distinct_open"), "features/probe_accuracy"
            ),
        ),
    ),
    Method(
        name="dynamic-subspace-learners",
        area="represent",
        title="Dynamic subspace learners",
        paper="Attention-based Dynamic Subspace Learners for Medical Image Analysis",
        arxiv=("2206.09068",),
        summary=(
            "Metric learning with labels whose embedding is divided into subspaces, each trained on a cluster of the "
            "examples.  Their number is found in training: where validation stalls, the useful neurons of the newest "
            "subspace become one of their own, and the others start afresh.  Spatial attention shows where it looks."
        ),
        module="subspace_jax.represent.dynamic_subspace_learners",
        configs=("represent/digits_learners", "represent/shape_texture"),
        command="subspace-jax train --config represent/digits_learners:dynamic --workdir work/learners",
        figures=(
            Figure(
                "recall at 1 on the test digits, dynamic learners",
                train("represent/digits_learners:dynamic"),
                "recall_at_1",
                at_least=0.96,
            ),
            Figure(
                "NMI of k-means, dynamic learners", train("represent/digits_learners:dynamic"), "nmi", at_least=0.88
            ),
            Figure(
                "share of runs with a split",
                train("represent/digits_learners:dynamic"),
                "learners/several",
                at_least=1.0,
            ),
            Figure("recall at 1, two fixed learners", train("represent/digits_learners:fixed"), "recall_at_1"),
            Figure("NMI, two fixed learners", train("represent/digits_learners:fixed"), "nmi"),
            Figure(
                "NMI of clusters with textures, of images with a shape and a texture",
                train("represent/shape_texture:dynamic"),
                "clusters/texture_nmi",
                seeds=(0,),
            ),
            Figure(
                "NMI of the same clusters with shapes",
                train("represent/shape_texture:dynamic"),
                "clusters/shape_nmi",
                seeds=(0,),
            ),
        ),
    ),
    Method(
        name="few-shot-survey",
        area="represent",
        title="Few-shot adaptation of dual encoders",
        paper="Few-shot Adaptation of Multi-modal Foundation Models: A Survey",
        arxiv=("2401.01736", "2207.09519", "2110.04544", "2109.01134"),
        summary=(
            "Adapts a frozen encoder of images and texts to new classes with a few labelled examples of each, on "
            "precomputed features: Tip-Adapter and Tip-Adapter-F, CLIP-Adapter, CoOp's prompts, residuals of the "
            "prototypes, linear probes, and all of them in subspaces.  One command compares them over shots and random "
            "draws, and says how far the domains are apart."
        ),
        module="subspace_jax.represent.few_shot_survey",
        configs=(),
        command=(
            "subspace-jax few-shot --support work/train.npz --query work/test.npz --text work/classes.npz "
            "--out work/few_shot"
        ),
        figures=(
            _few_shot(
                "digits shifted by a pixel, 4 shots, 3 draws: Tip minus zero-shot",
                _SHIFTED_DIGITS,
                "tip_minus_zero_shot",
                0.08,
            ),
            _few_shot("the same, Tip-F minus Tip", _SHIFTED_DIGITS, "tip_f_minus_tip", 0.05),
            _few_shot(
                "the same, least gain from 1 to 2, 4, 8 and 16 shots, Tip and Tip-F", _SHIFTED_DIGITS, "least_step", 0.0
            ),
            _few_shot("the same, accuracy of zero-shot", _SHIFTED_DIGITS, "zero_shot_4"),
            _few_shot("the same, accuracy of Tip", _SHIFTED_DIGITS, "tip_4"),
            _few_shot("the same, accuracy of Tip-F", _SHIFTED_DIGITS, "tip_f_4"),
            _few_shot(
                "MiniLM, docstrings by module, 16 shots, 3 draws: best of Tip, Tip-F and probe minus zero-shot",
                _DOCSTRINGS_BY_MODULE,
                "docstrings_gain",
                0.1,
            ),
        ),
        needs=("minilm",),
    ),
    Method(
        name="decoupling-probe",
        area="represent",
        title="Decoupling from a dominant domain",
        paper="When Alignment Hurts: Decoupling Representational Spaces in Multilingual Models",
        arxiv=("2508.12803",),
        summary=(
            "Fine-tunes a model on related domains, such as the dialects of a language, of which one dominates.  A "
            "variational probe estimates again and again the subspace of hidden states that tells the dominant one; a "
            "penalty keeps all states out of it."
        ),
        module="subspace_jax.represent.decoupling_probe",
        configs=("represent/decoupling_synthetic", "represent/decoupling_dialects"),
        command="subspace-jax train --config represent/decoupling_synthetic:l01 --workdir work/decoupling_l01",
        figures=(
            *_decoupled("0.01", "l001"),
            *_decoupled("0.1", "l01"),
            Figure(
                "probe accuracy on the mixture, weight 0.1, minus that with random subspaces",
                _mixture("l01"),
                "domains/probe_accuracy",
                at_most=-0.1,
                minus=_mixture("random"),
            ),
            _weighted("0.01", "l001", "none", at_most=-0.2),
            _weighted("0.1", "l01", "none"),
            _weighted("0.1", "l01", "random", at_most=-0.1),
            _of_dialects("probe accuracy", "domains/probe_accuracy", -0.02),
            _of_dialects(
                "accuracy of a probe that weighs both kinds the same", "domains/weighted_probe_accuracy", -0.02
            ),
            _of_dialects("validation loss", "loss", 0.01),
        ),
        needs=("smollm2",),
    ),
    Method(
        name="xfactors",
        area="represent",
        title="XFactors",
        paper="XFactors: Disentangled Information Bottleneck via Contrastive Supervision",
        arxiv=("2601.21688",),
        summary=(
            "A variational autoencoder whose code has a small subspace for each labelled factor and a residual for the "
            "rest, taught by a contrastive loss on each subspace.  It swaps one factor between images, generates "
            "images with a given value of a factor, and comes with the scores of disentanglement."
        ),
        module="subspace_jax.represent.xfactors",
        configs=("represent/sprites", "represent/openmoji"),
        command="subspace-jax train --config represent/sprites --workdir work/sprites",
        figures=(
            Figure("sprites: x by 5 neighbours in its subspace, test accuracy", _SPRITES, "factors/x_from_x", 0.95),
            Figure("the same, y in its subspace", _SPRITES, "factors/y_from_y", 0.95),
            Figure("the same, x in the subspace of y", _SPRITES, "factors/x_from_y", at_most=0.25),
            Figure("the same, y in the subspace of x", _SPRITES, "factors/y_from_x", at_most=0.25),
            Figure("mean squared error of the reconstruction of test images", _SPRITES, "mse", at_most=0.006),
            Figure("FactorVAE score", _SPRITES, "factors/factor_vae"),
            Figure("mutual information gap", _SPRITES, "factors/mig"),
            Figure("without the contrastive loss: x in the block of x", _VAE, "factors/x_from_x", seeds=(0,)),
            Figure("without the contrastive loss: FactorVAE score", _VAE, "factors/factor_vae", seeds=(0,)),
        ),
    ),
    Method(
        name="lambda-orthogonality",
        area="represent",
        title="Lambda-orthogonality: compatible embeddings",
        paper="λ-Orthogonality Regularization for Compatible Representation Learning",
        arxiv=("2509.16664",),
        summary=(
            "Replaces the embedding model of a store of vectors without recomputing the store: maps between the old "
            "and the new space, fitted to a sample of items by both models, the backward one orthogonal up to a "
            "threshold.  Recall is predicted before any vector is recomputed, and an order says what to re-embed first."
        ),
        module="subspace_jax.represent.lambda_orthogonality",
        configs=("represent/compatible_digits",),
        command="subspace-jax upgrade --old old.npz --new new.npz --out work/upgrade",
        figures=(
            Figure(
                "recall@10 of mapped WordLlama vectors in MiniLM's space, over the best least-squares map",
                _DOCSTRINGS,
                "mapped_over_least_squares",
                at_least=0.95,
                seeds=(0,),
            ),
            Figure("the same recall", _DOCSTRINGS, "mapped", seeds=(0,)),
            Figure("the same minus no map", _DOCSTRINGS, "mapped_minus_unmapped", at_least=0.1, seeds=(0,)),
            Figure(
                "area under the backfill curve, minus that of random order",
                _DOCSTRINGS,
                "area_minus_random",
                at_least=0.0,
                seeds=(0,),
            ),
            Figure("largest error of the predicted curve", _DOCSTRINGS, "curve_error", at_most=0.02, seeds=(0,)),
            Figure("residual of the backward map on digits, threshold 0.5", _digits("lam05"), "residual", 0.35, 0.65),
            Figure("the same, threshold 1", _digits("lam1"), "residual", 0.85, 1.15),
            Figure(
                "new queries in the old gallery, CMC-1: threshold 1 minus 0",
                _digits("lam1"),
                "retrieval/cross_cmc1",
                at_least=0.03,
                minus=_digits("lam0"),
            ),
            Figure(
                "new vectors mapped backward minus the new model itself, CMC-1, threshold 1",
                _digits("lam1"),
                "retrieval/kept_minus_new",
                at_least=-0.03,
            ),
            Figure(
                "the same, unconstrained",
                _digits("unconstrained"),
                "retrieval/kept_minus_new",
                at_most=-0.05,
            ),
        ),
        needs=("wordllama", "minilm"),
    ),
)
