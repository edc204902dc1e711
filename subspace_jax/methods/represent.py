"""Methods that learn and measure representations."""

from subspace_jax.methods.records import Figure, Method, train

_SPRITES = train("represent/sprites")
_VAE = train("represent/sprites:vae")

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
)
