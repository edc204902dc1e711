"""Methods that make one model of several."""

from subspace_jax.methods.records import Figure, Method, train

_CONCRETE = train("merge/digit_views:concrete")
_ADAPTED = train("merge/digit_views:concrete_adamerging")
_ADAMERGING = train("merge/digit_views:adamerging")


def _gain(seed: int) -> Figure:
    name = f"digit views: Concrete Task Arithmetic minus task arithmetic, mean accuracy of four tasks, networks {seed}"
    return Figure(name, _CONCRETE, "gain", at_least=0.01, seeds=(seed,))


METHODS = (
    Method(
        name="subspace-fusion",
        area="merge",
        title="Concrete fusion: merging fine-tuned models",
        paper="Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion",
        arxiv=("2312.06173", "2306.01708", "2212.04089", "2310.02575", "2111.09832", "2212.09849"),
        summary=(
            "Makes one model of several that were fine-tuned from one base: averages, task arithmetic, TIES, Fisher "
            "merging and RegMean, over parameter trees or Hugging Face folders; and, where the merged model predicts "
            "classes, masks of all parameters and coefficients that unlabelled inputs teach by the entropy of the "
            "predictions."
        ),
        module="subspace_jax.merge.subspace_fusion",
        configs=("merge/digit_views",),
        command="subspace-jax merge-models --method ties --base DIR --models A B C --out work/merged",
        figures=(
            *(_gain(seed) for seed in range(3)),
            Figure("the same, accuracy of Concrete Task Arithmetic", _CONCRETE, "accuracy"),
            Figure("the same, its least accuracy on a task", _CONCRETE, "worst"),
            Figure("task arithmetic", _CONCRETE, "task_arithmetic"),
            Figure("average", _CONCRETE, "average"),
            Figure("TIES", _CONCRETE, "ties"),
            Figure("each view by its own network", _CONCRETE, "individual"),
            Figure("layer-wise Concrete AdaMerging, networks 0", _ADAPTED, "accuracy", seeds=(0,)),
            Figure("layer-wise AdaMerging, no mask, networks 0", _ADAMERGING, "accuracy", seeds=(0,)),
            Figure(
                "golden vectors, rules to 1e-10 and training loops to 1e-6, failed tests",
                "python -m pytest tests/merge/test_subspace_fusion.py tests/merge/test_subspace_fusion_steps.py",
                "failures",
                at_most=0,
                seeds=(0,),
            ),
        ),
    ),
)
