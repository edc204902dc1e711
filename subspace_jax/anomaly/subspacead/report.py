"""What a detection writes: a table of scores, heat maps over the images, a page of its own."""

import base64
import csv
import html
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from subspace_jax import data, train
from subspace_jax.anomaly.subspacead.detect import Detection, resized_mask

SHOWN = 60  # images of a category on the page
_THUMBNAIL = 144
_OPACITY = 0.55
_TITLES = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1": "image best F1",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro": "AU-PRO at 0.3",
    "flagged_normal": "normal images flagged",
    "flagged_anomalous": "anomalous images flagged",
}
_MEANING = (
    "Images come by their score, the highest first, each beside its map: blue at the median of the category's maps or "
    "below it, red at their largest value."
)
_OUTLINED = " A white line is the outline of a known defect."
_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em;
color: #222 } table { border-collapse: collapse; margin: .6em 0; display: block; overflow-x: auto }
td, th { border-bottom: 1px solid #ddd; padding: .2em .9em .2em 0;
text-align: right } td:first-child, th:first-child { text-align: left }
.grid { display: flex; flex-wrap: wrap; gap: 14px } figure { margin: 0; width: 296px; font-size: 13px }
figure img { width: 288px; height: 144px }
figure.flagged { outline: 3px solid #c62828; outline-offset: 3px } figcaption { overflow-wrap: anywhere }"""


def write_scores(found: Sequence[Detection], path: pathlib.Path) -> None:
    """Writes ``scores.csv``: category, image, score, label and flagged (empty where unknown)."""
    with train.replacing(path) as partial, partial.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("category", "image", "score", "label", "flagged"))
        for own in found:
            for row in own.rows:
                flagged = "" if row.flagged is None else int(row.flagged)
                label = "" if row.image.label is None else row.image.label
                table.writerow((own.name, row.image.name, f"{row.score:.6g}", label, flagged))


def write_overlays(
    found: Detection, maps: pathlib.Path, side: int, folder: pathlib.Path, *, progress: bool = False
) -> dict[str, bytes]:
    """Writes a PNG of each image with its map over it; returns thumbnails for the page, JPEG by name of image.

    That of ``a.jpg`` is ``a.jpg.png``, for there may be an ``a.png``.  Thumbnails have the outlines of masks.
    The colours go from the median of all maps of the category to their largest value.
    """
    values = np.memmap(maps, np.float32, "r", shape=(len(found.rows), side, side))
    low, high = float(np.median(values[:, ::4, ::4])), float(np.max(values))
    shown = {row.image.name for row in sorted(found.rows, key=lambda row: -row.score)[:SHOWN]}
    thumbnails = {}
    colours = matplotlib.colormaps["turbo"]
    rows = tqdm(found.rows, desc=f"{found.name}: draw", unit="image", delay=2, disable=None if progress else True)
    for row, own in zip(rows, values, strict=True):
        image = data.resize(data.decode_image(row.image.path), (side, side), "bilinear")
        heat = np.clip((own - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
        over = np.rint(255 * colours(heat)[..., :3] * _OPACITY + image * (1 - _OPACITY)).astype(np.uint8)
        path = folder / (row.image.name if row.image.name.endswith(".png") else f"{row.image.name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(over).save(path)
        if row.image.name in shown:
            small = [data.resize(x, (_THUMBNAIL, _THUMBNAIL), "bilinear") for x in (image, over)]
            if row.image.mask is not None:
                small[1] = outlined(small[1], resized_mask(row.image.mask, _THUMBNAIL))
            buffer = io.BytesIO()
            Image.fromarray(np.concatenate(small, axis=1)).save(buffer, "JPEG", quality=85)
            thumbnails[row.image.name] = buffer.getvalue()
    return thumbnails


def outlined(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draws the outline of a mask in white beside black, which shows on any colour.

    Args:
      pixels: uint8 ``[side, side, 3]``.
      mask: ``[side, side]`` bool.

    Returns:
      uint8 ``[side, side, 3]``; pixels within the outline are as before.
    """
    inner = _grown(mask)
    outer = _grown(inner)
    drawn = np.where((outer & ~inner)[..., None], np.uint8(0), pixels)
    return np.where((inner & ~mask)[..., None], np.uint8(255), drawn)


def _grown(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask and their neighbours to the four sides."""
    wide = np.pad(mask, 1)
    return mask | wide[2:, 1:-1] | wide[:-2, 1:-1] | wide[1:-1, 2:] | wide[1:-1, :-2]


def mean_metrics(found: Sequence[Detection]) -> dict[str, float]:
    """Means over the categories that have a metric, with seconds an image, images and skipped files."""
    names = [name for name in _TITLES if any(name in own.metrics for own in found)]
    means = {name: float(np.mean([own.metrics[name] for own in found if name in own.metrics])) for name in names}
    images = sum(len(own.rows) for own in found)
    seconds = sum(own.seconds * len(own.rows) for own in found) / images
    return means | {"images": images, "skipped": sum(len(o.skipped) for o in found), "seconds_per_image": seconds}


def table_rows(
    found: Sequence[Detection], published: Mapping[str, float] | None = None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the table of categories; with several a row of means, and of what is published."""
    names = [name for name in _TITLES if any(name in own.metrics for own in found)]
    limits = ["threshold"] if any(own.threshold is not None for own in found) else []
    head = ("category", "normal", "images", "skipped", "rank", *limits, *(_TITLES[name] for name in names))

    def cells(values: Mapping[str, float]) -> list[str]:
        return [f"{values[name]:.4f}" if values.get(name) else "0" if name in values else "" for name in names]

    rows = []
    for own in found:
        counts = (len(own.rows), len(own.skipped), own.rank)
        threshold = [] if own.threshold is None else [f"{own.threshold:.4g}"]
        rows.append((own.name, str(own.num_normal), *map(str, counts), *threshold, *cells(own.metrics)))
    empty = [""] * (4 + len(limits))
    if len(found) > 1:
        rows.append(("mean", *empty, *cells(mean_metrics(found))))
    known = {name: value for name, value in (published or {}).items() if value}
    if known:
        rows.append(("published, not rerun", *empty, *cells(known)))
    return head, rows


def table_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table for a terminal."""
    lines = [head, *rows]
    sizes = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(n) for c, n in zip(line, sizes, strict=True)).rstrip() for line in lines)


def write_page(
    found: Sequence[Detection],
    thumbnails: Sequence[Mapping[str, bytes]],
    path: pathlib.Path,
    *,
    described: str,
    published: Mapping[str, float] | None = None,
) -> None:
    """Writes the page: one file without scripts, and without anything from elsewhere.

    Args:
      found: What was found, category by category.
      thumbnails: Those of each category, from :func:`write_overlays`.
      path: The file.
      described: Backbone and settings, in a line.
      published: Published figures to show in the table.
    """
    head, rows = table_rows(found, published)
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    masks = any(row.image.mask is not None for own in found for row in own.rows)
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    parts = [
        f"<h1>Anomalies</h1><p>{html.escape(described)}</p><table>{table}</table><p>{_MEANING}{_OUTLINED * masks}</p>"
    ]
    for own, pictures in zip(found, thumbnails, strict=True):
        parts += [f"<h2>{html.escape(own.name)}</h2>", *_figures(own, pictures)]
    title = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Anomalies</title>'
    with train.replacing(path) as partial:
        partial.write_text(f"{title}<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n", encoding="utf-8")


def _figures(found: Detection, pictures: Mapping[str, bytes]) -> Iterator[str]:
    ordered = sorted(found.rows, key=lambda row: -row.score)
    if len(ordered) > SHOWN:
        yield f"<p>The {SHOWN} highest scores of {len(ordered)}; scores.csv and maps/ have all.</p>"
    yield '<div class="grid">'
    for row in ordered[:SHOWN]:
        label = {None: "", 0: " · normal", 1: " · anomalous"}[row.image.label]
        verdict = "" if row.flagged is None else " · flagged" if row.flagged else " · passed"
        name, kind = html.escape(row.image.name), ' class="flagged"' if row.flagged else ""
        source = f"data:image/jpeg;base64,{base64.b64encode(pictures[row.image.name]).decode()}"
        picture = f'<img alt="{name} and its anomaly map" src="{source}">'
        caption = f"<b>{row.score:.4g}</b>{label}{verdict}<br>{name}"
        yield f"<figure{kind}>{picture}<figcaption>{caption}</figcaption></figure>"
    yield "</div>"
    if found.skipped:
        items = "".join(f"<li>{html.escape(p)}: {html.escape(why)}</li>" for p, why in found.skipped.items())
        yield f"<p>Skipped, as they can't be read: {len(found.skipped)}</p><ul>{items}</ul>"
