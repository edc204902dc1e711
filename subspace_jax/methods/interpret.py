"""Methods that explain networks and their training."""

from subspace_jax.methods.records import Figure, Method, golden

_PLANTED = "python -m pytest tests/interpret/test_safety_subspaces_figures.py"


def _planted(name: str, metric: str, at_least: float | None = None, at_most: float | None = None) -> Figure:
    return Figure(name, _PLANTED, metric, at_least=at_least, at_most=at_most, seeds=(0,))


_CONVERGENT = "python -m pytest tests/interpret/test_convergent_figures.py"


def _aligned(name: str, part: str, metric: str, at_least: float | None = None) -> Figure:
    command = f"python -m pytest tests/interpret/test_platos_cave_3d_figures.py -k {part}"
    return Figure(name, command, metric, at_least=at_least, seeds=(0,))


_PICTURES = "python -m pytest tests/interpret/test_compositional_pictures.py"


_HEADS = "python -m pytest tests/interpret/test_attention_ssm_figures.py"


_OPERATORS = "subspace-jax attention-operators --model work/models/smollm2"


_SAE = "subspace-jax train --config interpret/polysae_planted"


def _pairs(name: str, order: int, metric: str, at_least: float | None = None, at_most: float | None = None) -> Figure:
    return Figure(f"planted pairs, {name}", f"{_SAE}:order{order}", metric, at_least=at_least, at_most=at_most)


METHODS = (
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
        name="safety-subspaces",
        area="interpret",
        title="Subspaces of updates: alignment and fine-tuning",
        paper="Safety Subspaces are Not Distinct: A Fine-Tuning Case Study",
        arxiv=("2505.14185",),
        summary=(
            "Measures whether fine-tuning moves a model in the directions in which an earlier update, such as "
            "alignment, moved it: projects one update on the leading directions of the other or away from them, "
            "rebuilds the model, and compares subspaces of updates and activations with what random ones would give."
        ),
        module="subspace_jax.interpret.safety_subspaces",
        configs=(),
        command="subspace-jax project-update --base base --aligned chat --tuned mine --out work/projected",
        figures=(
            _planted("planted refusal, orth at 0.01: harm, worst of 3 seeds", "orth_0.01_harm_worst", at_most=0.3),
            _planted("the same, utility, worst of 3 seeds", "orth_0.01_utility_worst", at_least=0.75),
            _planted("not projected: harm, mean of 3 seeds", "mixed_harm"),
            _planted("not projected: utility", "mixed_utility"),
            _planted("same at 0.01: harm", "same_0.01_harm"),
            _planted("same at 0.01: utility", "same_0.01_utility"),
            _planted("orth at 0.25: utility", "orth_0.25_utility"),
            _planted("MSO at 0.9 of alignment and harmful updates", "mso_alignment_harmful"),
            _planted("MSO at 0.9 of useful and harmful updates", "mso_useful_harmful"),
            _planted("its random baseline", "mso_random"),
        ),
    ),
    Method(
        name="convergent-learning",
        area="interpret",
        title="Convergent learning: do two networks learn the same",
        paper="Convergent Learning: Do different neural networks learn the same representations?",
        arxiv=("1511.07543", "1706.05806", "1806.05759", "1905.00414", "2108.01661"),
        summary=(
            "Compares the representations of two networks: which units, groups of units and subspaces correspond, and "
            "similarities (CKA, CCA, SVCCA, PWCCA, Procrustes, neighbours), each beside the mean of shuffled examples, "
            "with a p-value."
        ),
        module="subspace_jax.interpret.convergent_learning",
        configs=(),
        command="subspace-jax compare a.npz b.npz --out work/compare",
        figures=(
            Figure(
                "two networks for digits, the worst of three pairs: mean correlation of matched hidden units",
                _CONVERGENT,
                "max_match",
                at_least=0.55,
                seeds=(0,),
            ),
            Figure("the same over that of shuffled examples", _CONVERGENT, "max_match_over_shuffled", 5.0, seeds=(0,)),
            Figure("linear CKA of the hidden units", _CONVERGENT, "linear_cka", at_least=0.9, seeds=(0,)),
            Figure("the same of shuffled examples", _CONVERGENT, "linear_cka_shuffled", seeds=(0,)),
            Figure("debiased linear CKA, calibrated", _CONVERGENT, "calibrated_debiased_cka", seeds=(0,)),
            Figure(
                "share of logits matched with that of their own class",
                _CONVERGENT,
                "logits_matched_with_their_own",
                at_least=1.0,
                seeds=(0,),
            ),
        ),
    ),
    Method(
        name="platos-cave-3d",
        area="interpret",
        title="Alignment of two feature spaces in a subspace",
        paper="Escaping Plato's Cave: Towards the Alignment of 3D and Text Latent Spaces",
        arxiv=("2503.05283", "2401.05224", "2405.07987"),
        summary=(
            "Finds low-dimensional subspaces in which the features of two frozen encoders, of shapes and of texts say, "
            "are correlated, by CCA of some known pairs, aligns them there by an affine map or by local CKA, and "
            "matches or retrieves unseen items of one with those of the other.  It takes any two paired feature "
            "matrices."
        ),
        module="subspace_jax.interpret.platos_cave_3d",
        configs=(),
        command="subspace-jax align --x images.npy --y captions.npy --out work/align",
        figures=(
            _aligned("halves of digits, 3 draws: top-5 retrieval in 50 directions", "digit", "k50_top_5", 0.5),
            _aligned("the same over that with all features", "digit", "top_5_over_full", 1.3),
            _aligned("the same with all features", "digit", "k50_full_top_5"),
            _aligned("the same in 5 directions", "digit", "k5_top_5"),
            _aligned("the same in 50 directions by local CKA", "digit", "local_cka_top_5"),
            _aligned("the same with all features by local CKA", "digit", "local_cka_full_top_5"),
            _aligned("matching in 50 directions", "digit", "k50_matching"),
            _aligned("matching with all features", "digit", "k50_full_matching"),
            _aligned(
                "WordLlama finds MiniLM, 300 anchors: top-1 in 50 directions", "docstrings", "anchors300_top_1", 0.7
            ),
            _aligned("the same with all features", "docstrings", "anchors300_full_top_1"),
            _aligned("the same, 1,600 anchors", "docstrings", "anchors1600_top_1"),
            _aligned("the same with all features, 1,600 anchors", "docstrings", "anchors1600_full_top_1"),
            _aligned(
                "correlation of distances of descriptions with Chamfer distances", "descriptions", "chamfer_before"
            ),
            _aligned("the same in the subspace", "descriptions", "chamfer_after"),
        ),
        needs=("wordllama", "minilm"),
    ),
    Method(
        name="compositional-linear",
        area="interpret",
        title="Compositional representations",
        paper="Compositional Generalization Requires Linear, Orthogonal Representations in Vision Embedding Models",
        arxiv=("2602.24264", "2302.14383"),
        summary=(
            "Measures how far embeddings are from the form that compositional generalisation needs: a sum of one "
            "vector per concept value, orthogonal across concepts, each concept of low rank; and how well linear "
            "probes do on combinations of values that they never saw."
        ),
        module="subspace_jax.interpret.compositional_linear",
        configs=(),
        command="subspace-jax compositional --features features.npz --labels labels.csv --out work/compositional",
        figures=(
            Figure(
                "rank correlation of projected R2 with accuracy on new combinations, seven representations of pictures",
                _PICTURES,
                "spearman",
                at_least=0.8,
                seeds=(0,),
            ),
            Figure("projected R2 of ideal factors with noise", _PICTURES, "ideal_r2", at_least=0.95, seeds=(0,)),
            Figure("their accuracy on new combinations", _PICTURES, "ideal_accuracy", at_least=0.95, seeds=(0,)),
            Figure("accuracy of a supervised network's features", _PICTURES, "supervised_accuracy", seeds=(0,)),
            Figure("accuracy of pixels", _PICTURES, "pixels_accuracy", seeds=(0,)),
            Figure("accuracy of five random layers", _PICTURES, "random5_accuracy", seeds=(0,)),
        ),
    ),
    Method(
        name="attention-ssm",
        area="interpret",
        title="Attention and state-space layers as heads",
        paper="How Many Heads Make an SSM? A Unified Framework for Attention and State Space Models",
        arxiv=("2512.15115",),
        summary=(
            "Writes a sequence layer as operators between pairs of tokens, counts the heads that it needs, turns a "
            "linear state-space layer into exactly that many, and measures how gradients travel with distance.  It "
            "says how many of its heads each attention layer of a language model uses."
        ),
        module="subspace_jax.interpret.attention_ssm",
        configs=(),
        command="subspace-jax attention-operators --model work/models/smollm2 --out work/operators",
        figures=(
            Figure(
                "largest relative error of the heads of a layer with 8 decays, float64, three layers",
                _HEADS,
                "heads_error",
                at_most=1e-10,
                seeds=(0,),
            ),
            Figure(
                "error of 1 to 8 heads minus the tail of the singular values, largest",
                _HEADS,
                "tail_error",
                at_most=1e-10,
                seeds=(0,),
            ),
            Figure(
                "slope of the logarithm of the gradient over that of the spectral radius, minus 1, largest",
                _HEADS,
                "largest_slope_error",
                at_most=0.05,
                seeds=(0,),
            ),
            Figure(
                "gradient on highway inputs, largest over smallest of all distances",
                _HEADS,
                "highway_ratio",
                at_most=1.05,
                seeds=(0,),
            ),
            Figure("the same layers, smallest error of 7 heads", _HEADS, "error_with_one_head_less", seeds=(0,)),
            golden("tests/interpret/test_attention_ssm.py", "tests/interpret/test_attention_ssm_attention.py"),
            Figure(
                "SmolLM2: smallest interaction rank of a layer, over its heads",
                _OPERATORS,
                "rank_over_heads",
                at_least=1.0,
                seeds=(0,),
            ),
            Figure("the same, effective rank, mean of 30 layers of 9 heads", _OPERATORS, "effective_rank", seeds=(0,)),
            Figure("the same, error of the best 5 heads, mean", _OPERATORS, "half_error", seeds=(0,)),
        ),
        needs=("smollm2",),
    ),
    Method(
        name="polysae",
        area="interpret",
        title="Sparse autoencoders, linear and polynomial",
        paper="PolySAE: Modeling Feature Interactions in Sparse Autoencoders via Polynomial Decoding",
        arxiv=("2602.01322",),
        summary=(
            "Explains the activations of a network as few non-negative features of many, by a sparse autoencoder with "
            "a linear decoder or with a polynomial one, in which two features that are active together can add what "
            "neither adds alone.  Activations are computed where the autoencoder trains, on one device or a pod."
        ),
        module="subspace_jax.interpret.polysae",
        configs=("interpret/polysae_planted", "interpret/sae", "interpret/sae_smollm2"),
        command="subspace-jax sae --model work/models/smollm2 --layer 15 --workdir work/sae",
        figures=(
            _pairs("order 2: share of the variance left, mean of 3 seeds", 2, "unexplained", at_most=0.02),
            _pairs("order 1: the same", 1, "unexplained", at_least=0.1),
            _pairs("order 2: planted ones among the three strongest interactions", 2, "pairs", at_least=3.0),
            _pairs("order 2: correlation of strength with being active together", 2, "correlation", at_most=0.3),
        ),
    ),
)
