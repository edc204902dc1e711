"""Methods for tasks that arrive one after another."""

from subspace_jax.methods.records import Figure, Method, golden, train


def _digits(method: str) -> str:
    return f"subspace-jax continual --config continual/permuted_digits:{method}"


_COSO, _MNIST = _digits("coso"), "subspace-jax continual --config continual/permuted_mnist:coso"

_TEACHERS = train("continual/igsp_teacher")


def _teachers(name: str, metric: str, **bounds: float) -> Figure:
    return Figure(f"{name}, six linear teachers", _TEACHERS, metric, **bounds)


METHODS = (
    Method(
        name="continual-learning",
        area="continual",
        title="Continual learning: CoSO and GPM over streams of tasks",
        paper="CoSO: Continuous Subspace Optimization for Continual Learning",
        arxiv=("2505.11816", "2103.09762", "1612.00796", "1902.10486"),
        summary=(
            "Trains tasks that arrive one after another and measures what is forgotten: CoSO and gradient projection "
            "memory, whose updates stay out of the subspaces of earlier tasks, with a certificate of how far each step "
            "may have moved their outputs; and LoRA for each task, elastic weight consolidation, experience replay, "
            "nearest class means, fine-tuning and joint training beside them."
        ),
        module="subspace_jax.continual",
        configs=("continual/permuted_digits", "continual/permuted_mnist", "continual/split_mnist"),
        command="subspace-jax continual --config continual/permuted_digits --workdir work/permuted_digits",
        figures=(
            Figure("permuted digits, 5 tasks, CoSO: final accuracy", _COSO, "final_accuracy", at_least=0.91),
            Figure("the same: forgetting", _COSO, "forgetting", at_most=0.02),
            Figure(
                "the same: final accuracy minus sequential Adam's",
                _COSO,
                "final_accuracy",
                at_least=0.10,
                minus=_digits("sequential"),
            ),
            Figure(
                "the same: final accuracy minus that without a history",
                _COSO,
                "final_accuracy",
                at_least=0.0,
                minus=_digits("coso_without_history"),
            ),
            Figure("the same: bounds that a change violates", _COSO, "violations", at_most=0),
            Figure("the same: bound over measured change, median", _COSO, "bound_over_measured"),
            Figure("permuted digits, GPM: final accuracy", _digits("gpm"), "final_accuracy"),
            Figure("the same: forgetting", _digits("gpm"), "forgetting"),
            Figure("the same: bounds that a change violates", _digits("gpm"), "violations", at_most=0),
            *(
                Figure(f"permuted digits, {title}: {score.replace('_', ' ')}", _digits(method), score, seeds=(0,))
                for title, method in (
                    ("sequential Adam", "sequential"),
                    ("EWC", "ewc"),
                    ("replay of 200 images", "replay"),
                    ("LoRA for each task", "lora"),
                    ("class means of random features", "class_means"),
                )
                for score in ("final_accuracy", "forgetting")
            ),
            Figure("permuted digits, joint training: final accuracy", _digits("joint"), "final_accuracy", seeds=(0,)),
            Figure(
                "permuted MNIST of 5,000, 10 tasks, CoSO: forgetting", _MNIST, "forgetting", at_most=0.02, seeds=(0,)
            ),
            Figure("the same: final accuracy", _MNIST, "final_accuracy", seeds=(0,)),
            Figure("the same: bounds that a change violates", _MNIST, "violations", at_most=0, seeds=(0,)),
            Figure("the same: bound over measured change, median", _MNIST, "bound_over_measured", seeds=(0,)),
        ),
    ),
    Method(
        name="igsp",
        area="continual",
        title="Shared experts for a stream of tasks (reconstruction of iGSP)",
        paper=(
            "iGSP: Implicit Gradient Subspace Projection for Efficient Continual Learning of Vision-Language Models"
        ),
        arxiv=("2605.19301", "2403.11549"),
        summary=(
            "A frozen model meets tasks one after another, and a pool of low-rank experts is shared: a task uses those "
            "of earlier tasks where they serve, and adds few of its own.  Earlier tasks forget nothing.  A "
            "reconstruction of iGSP from its abstract: its code and its full text could not be read."
        ),
        module="subspace_jax.continual.igsp",
        configs=("continual/igsp_teacher", "continual/igsp_digits", "continual/igsp_mtil"),
        command="subspace-jax train --config continual/igsp_digits:split --workdir work/igsp_digits",
        figures=(
            _teachers("largest relative error of a teacher at the end", "largest_error", at_most=0.03),
            _teachers("forgetting, given the task", "forgetting", at_most=0.0),
            _teachers("most experts that a mixture of old teachers added", "most_added_where_not", at_most=0.0),
            _teachers("fewest experts that a new teacher added", "fewest_added_where_new", at_least=1.0),
            golden("tests/continual/test_igsp_core.py"),
        ),
    ),
)
