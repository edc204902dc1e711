"""Methods that learn and measure representations."""

from subspace_jax.methods.records import Figure, Method, train

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
