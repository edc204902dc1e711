"""Methods that make trained networks smaller."""

from subspace_jax.methods.records import Figure, Method

_KERNELS = "python -m pytest tests/compress/test_cospadi.py -k 'planted or digits'"


def _figure(name: str, metric: str, at_most: float | None = None) -> Figure:
    return Figure(name, _KERNELS, metric, at_most=at_most, seeds=(0,))


METHODS = (
    Method(
        name="cospadi",
        area="compress",
        title="CoSpaDi: compression by sparse dictionaries",
        paper="CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning",
        arxiv=("2509.22075", "2403.07378", "2312.05821", "2410.03765"),
        summary=(
            "Makes the linear layers of a trained language model smaller, without gradients: a small dictionary times "
            "sparse coefficients, so that every output has a subspace of its own, fitted to the error of the outputs "
            "on some text.  SVD-LLM, ASVD, Basis Sharing and plain SVD stand beside it at equal bytes."
        ),
        module="subspace_jax.compress.cospadi",
        configs=(),
        command=(
            "subspace-jax compress --model work/models/smollm2 --ratio 0.2 --calibration docstrings --out work/small"
        ),
        figures=(
            _figure(
                "output error on planted subspaces over that of SVD-LLM, worst of 3 seeds", "planted_share_0.2", 0.6
            ),
            _figure("the same with 40 % of the storage removed", "planted_share_0.4", 0.6),
            _figure(
                "output error on held-out digits minus that of SVD-LLM, 20 % removed", "digits_difference_0.2", -0.001
            ),
            _figure("the same with 40 % removed", "digits_difference_0.4", -0.0005),
            _figure("output error on held-out digits, 20 % removed", "digits_cospadi_0.2"),
            _figure("the same of SVD-LLM", "digits_svd_llm_0.2"),
            _figure("failed tests of these", "failures", 0),
        ),
    ),
)
