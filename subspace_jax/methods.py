"""The index of all methods: read by ``subspace-jax methods``, ``scripts/figures.py``, the docs and the tests.

It imports nothing but the standard library, so that it can be searched at once.
"""

import difflib
import re
from typing import NamedTuple


class Figure(NamedTuple):
    """A figure that a command must reach.

    Attributes:
      name: What is measured, on what.
      command: The command of one seed.  ``scripts/figures.py`` appends ``--workdir`` and ``--config.seed``, or
        ``--junitxml`` where it is pytest.
      metric: Name in the run's ``result.json``; ``seconds`` is the time that the command took; of pytest ``failures``,
        or a property that a test records.
      at_least: Lower bound, inclusive.  A figure without bounds is there for comparison.
      at_most: Upper bound, inclusive.
      seeds: Seeds of the runs.
      reduce: ``"mean"`` or ``"median"`` over the seeds.
      minus: Command of a baseline whose value is subtracted.
      over: Command of a baseline by whose value is divided.
    """

    name: str
    command: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    reduce: str = "mean"
    minus: str = ""
    over: str = ""


class Method(NamedTuple):
    """A method of the library.

    Attributes:
      name: Its name, of lower-case words with hyphens.
      area: What it is for.
      title: Title for people.
      paper: Title of the paper; empty where there is none.
      arxiv: arXiv ids, that of the paper first.
      summary: What it does, in one paragraph: the first of its page.
      module: Module with its public names.
      configs: Names of its configs, see ``subspace-jax configs``.
      command: A command to begin with.
      figures: What it must reach, the most telling first.
    """

    name: str
    area: str
    title: str
    paper: str
    arxiv: tuple[str, ...]
    summary: str
    module: str
    configs: tuple[str, ...]
    command: str
    figures: tuple[Figure, ...]

    @property
    def doc(self) -> str:
        """Path of its page in the repository."""
        return f"docs/methods/{self.name}.md"

    @property
    def figure_file(self) -> str:
        """Path of its measured figures in the repository."""
        return f"docs/figures/{self.name}.json"


def _train(config: str) -> str:
    return f"subspace-jax train --config {config}"


def _golden(*files: str) -> Figure:
    return Figure(
        "golden vectors to 1e-9, failed tests", f"python -m pytest {' '.join(files)}", "failures", at_most=0, seeds=(0,)
    )


def _fakes(kind: str) -> tuple[Figure, ...]:
    effort, head = (_train(f"adapters/fake_digits:{variant}_{kind}") for variant in ("effort", "probe"))
    name = f"AUC on unseen kinds of fakes, trained on {kind}"
    return (
        Figure(f"{name}: Effort minus the head alone", effort, "auc", at_least=0.0, minus=head),
        Figure(f"{name}: Effort", effort, "auc"),
        Figure(f"{name}: the head alone", head, "auc"),
    )


def _adaprelora(variant: str, rank: int) -> str:
    return _train(f"optim/low_rank_regression:{variant} --config.model.rank={rank}")


def _tiny_gpt(variant: str) -> str:
    return f"subspace-jax pretrain --config optim/tiny_gpt:{variant}"


def _over_adamw(name: str, variant: str, at_most: float | None = None) -> Figure:
    command, adamw = _tiny_gpt(variant), _tiny_gpt("adamw")
    return Figure(f"{name}: loss over AdamW's", command, "loss", at_most=at_most, seeds=(0,), over=adamw)


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
            Figure("test accuracy on digits, k = 8", _train("gcr/digits:k8"), "accuracy", at_least=0.97),
            Figure("the same, k = 1", _train("gcr/digits:k1"), "accuracy"),
            Figure("the same, cosine head", _train("gcr/digits:cosine"), "accuracy"),
            Figure("the same, softmax head", _train("gcr/digits:softmax"), "accuracy"),
            Figure("test accuracy on random subspaces, k = 4", _train("gcr/synthetic:k4"), "accuracy", at_least=0.94),
            Figure("the same, k = 1", _train("gcr/synthetic:k1"), "accuracy"),
            Figure("the same, softmax head", _train("gcr/synthetic:softmax"), "accuracy"),
            Figure(
                "the same, k = 4 minus k = 1",
                _train("gcr/synthetic:k4"),
                "accuracy",
                at_least=0.25,
                minus=_train("gcr/synthetic:k1"),
            ),
            Figure("test accuracy of ResNet-18-D on digits, k = 8", _train("gcr/digits_resnet:k8"), "accuracy"),
            Figure("the same, softmax head", _train("gcr/digits_resnet:softmax"), "accuracy"),
            Figure(
                "the same, k = 8 minus softmax",
                _train("gcr/digits_resnet:k8"),
                "accuracy",
                at_least=-0.005,
                minus=_train("gcr/digits_resnet:softmax"),
            ),
        ),
    ),
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
        configs=("adapters/rotated_digits", "adapters/rotated_images", "lm/tiny", "lm/gpt2_medium_e2e", "lm/large"),
        command="subspace-jax train --config adapters/rotated_digits:dora --workdir work/dora",
        figures=(
            Figure(
                "test accuracy on rotated digits, DoRA",
                _train("adapters/rotated_digits:dora"),
                "accuracy",
                at_least=0.92,
            ),
            Figure("the same, LoRA", _train("adapters/rotated_digits:lora"), "accuracy", at_least=0.92),
            Figure("the same, rsLoRA", _train("adapters/rotated_digits:rslora"), "accuracy"),
            Figure("the same, the head alone", _train("adapters/rotated_digits:head"), "accuracy"),
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
                _train("adapters/rotated_digits:svfit"),
                "accuracy",
                at_least=0.85,
            ),
            Figure(
                "the same, with the linear head",
                _train("adapters/rotated_digits:svfit_head"),
                "accuracy",
                at_least=0.95,
            ),
            Figure("the same, the head alone", _train("adapters/rotated_digits:head"), "accuracy"),
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
        configs=("optim/low_rank_regression", "optim/tiny_e2e"),
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
            _golden("tests/optim/test_lora_golden.py"),
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
            _golden("tests/optim/test_projection_golden.py", "tests/optim/test_coso.py"),
        ),
    ),
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
            Figure("validation loss, nats a byte", "subspace-jax pretrain --config lm/tiny", "loss", seeds=(0,)),
            Figure(
                "seconds on two CPU cores", "subspace-jax pretrain --config lm/tiny", "seconds", at_most=300, seeds=(0,)
            ),
        ),
    ),
)


def find_methods(query: str) -> tuple[Method, ...]:
    """Returns the methods that hold every word of a query: in name, area, title, paper, arXiv id or summary."""
    words = query.lower().split()
    return tuple(method for method in METHODS if all(word in _text(method) for word in words))


def near_methods(query: str) -> tuple[Method, ...]:
    """Returns the methods with a word close to one of a query, the closest first."""
    words = [set(re.findall(r"[\w+.-]{3,}", _text(method))) for method in METHODS]
    scores = {}
    for method, known in zip(METHODS, words, strict=True):
        near = [(word, other) for word in query.lower().split() for other in difflib.get_close_matches(word, known)]
        if near:
            scores[method.name] = max(difflib.SequenceMatcher(None, *pair).ratio() for pair in near)
    return tuple(sorted((m for m in METHODS if m.name in scores), key=lambda m: -scores[m.name]))[:3]


def requirement(figure: Figure) -> str:
    """Returns what a figure must reach as text, such as ``"at least 0.97"``; empty for one without bounds."""
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("at least", figure.at_least), ("at most", figure.at_most))
        if bound is not None
    ]
    return ", ".join(bounds)


def _text(method: Method) -> str:
    fields = (method.name, method.area, method.title, method.paper, *method.arxiv, method.summary)
    return " ".join(fields).lower()
