"""Methods that find what is unlike a set of normal examples."""

from subspace_jax.methods.records import Figure, Method, golden

_BRICK = "python -m pytest tests/anomaly/test_subspacead_brick.py"
_DIGITS = "python -m pytest tests/anomaly/test_subspacead_detector.py -k digits"
_DINO = "python -m pytest tests/anomaly/test_subspacead_dinov2.py"
_WAYS = {"subspace": "subspace", "bank": "nearest-neighbour memory bank of the same features"}


def _figure(name: str, command: str, metric: str, at_least: float | None = None) -> Figure:
    return Figure(name, command, metric, at_least=at_least, seeds=(0,))


def _textures(side: int, shots: int, way: str) -> Figure:
    name = f"brick, grass, gravel with discs of another texture, DINOv2-small at {side} px, normal crops: {shots}"
    return _figure(f"{name}: image AUROC by {_WAYS[way]}", f"{_DINO} -k {side}", f"{way}_{side}_{shots}_image_auroc")


METHODS = (
    Method(
        name="subspacead",
        area="anomaly",
        title="SubspaceAD: anomaly detection without training",
        paper="SubspaceAD: Training-Free Few-Shot Anomaly Detection via Subspace Modeling",
        arxiv=("2602.23013",),
        summary=(
            "Flags images that are unlike a few normal ones, and shows where: features of patches by a frozen vision "
            "transformer, or pixels, span a subspace of normal variation, and the squared distance from it is the "
            "score of a patch."
        ),
        module="subspace_jax.anomaly.subspacead",
        configs=("anomaly/mvtec", "anomaly/visa"),
        command="subspace-jax detect --normal photos/good --test photos/new --out work/detect",
        figures=(
            _figure("brick with discs of noise, pixel patches: image AUROC", _BRICK, "brick_image_auroc", 0.99),
            _figure("the same: pixel AUROC, pixel patches", _BRICK, "brick_pixel_auroc", 0.99),
            _figure("the same: AU-PRO at 0.3, pixel patches", _BRICK, "brick_aupro", 0.98),
            _figure("digits of one class against the others, mean AUROC of ten", _DIGITS, "digits_auroc", 0.98),
            _figure(
                "brick with discs of noise at 224 px, DINOv2-small, 8 normal crops: image AUROC",
                f"{_DINO} -k noise",
                "brick_noise_image_auroc",
                0.98,
            ),
            _figure("the same: pixel AUROC, DINOv2-small", f"{_DINO} -k noise", "brick_noise_pixel_auroc"),
            _figure("the same: AU-PRO at 0.3, DINOv2-small", f"{_DINO} -k noise", "brick_noise_aupro"),
            *(_textures(side, shots, way) for side in (224, 448) for shots in (1, 4, 8) for way in _WAYS),
            golden("tests/anomaly/test_subspacead.py", "tests/metrics/test_anomaly.py"),
        ),
        needs=("dinov2-small",),
    ),
)
