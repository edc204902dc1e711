"""Methods that learn and measure representations."""

from subspace_jax.methods.records import Figure, Method, train

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
)
