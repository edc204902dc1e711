"""Methods that learn and measure representations."""

from subspace_jax.methods.records import Figure, Method, train


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
        ),
    ),
)
