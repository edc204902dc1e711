"""The command that trains a sparse autoencoder, and shows what its features stand for."""

import argparse
import os

from subspace_jax.cli import runs, shared

_SAE = """
    subspace-jax sae --model work/models/smollm2 --layer 15 --workdir work/sae      # on docstrings, half an hour
    subspace-jax sae --model work/models/smollm2 --layer 15 --data my.txt --decoder shared --workdir work/polysae
    subspace-jax sae --data vectors.npy --features 2048 --k 16 --workdir work/sae_vectors
    subspace-jax sae --config interpret/sae_smollm2:polysae --workdir work/sae_smollm2

    --data is "docstrings" (of the standard library), a file of texts, or with no model vectors: an .npy file or a
    folder of them.  Activations are computed within the step, on the devices where the autoencoder trains.

    The folder gets report.html (figures, and the texts where features are most active), features.json, result.json, and
    of a linear decoder sae_lens/, a folder that SAELens loads.  A step of 8 rows of 128 tokens with SmolLM2 and 4,096
    features takes about a second on two cores; a step on vectors takes 256 of them
    (--config.data.batch_size=N).  A run that was stopped resumes with the same command.
    """
_FLAGS = {
    "model": "model.folder",
    "layer": "model.layer",
    "features": "model.d_sae",
    "k": "model.k",
    "sparsifier": "model.sparsifier",
    "decoder": "model.decoder",
    "data": "data.source",
    "evaluation": "data.evaluation",
    "steps": "train.steps",
}
_VECTORS = 256  # of a step on vectors, where a row of text would be many


def add_commands(commands) -> None:
    """Adds ``sae``."""
    summary = "train a sparse autoencoder on activations, linear or polynomial, and show what its features stand for"
    parser = shared.add_command(commands, "sae", summary, _sae, _SAE, fields=True, trains=True)
    parser.add_argument("--model", metavar="DIR", help="language model: a Hugging Face folder or GGUF file")
    parser.add_argument("--layer", type=int, help="hidden state to explain: that after so many layers (default: 1)")
    parser.add_argument("--data", metavar="FILE", help="texts or vectors (default: docstrings of the standard library)")
    parser.add_argument("--evaluation", metavar="FILE", help="others for evaluation (default: a twentieth of --data)")
    parser.add_argument("--features", type=int, metavar="M", help="number of features (default: 4096)")
    parser.add_argument("--k", type=float, help="features of a code (default: 32)")
    parser.add_argument("--sparsifier", help="topk (default), batchtopk, matryoshka or jumprelu")
    parser.add_argument("--decoder", help="linear (default), shared (a polynomial one, PolySAE) or separate")
    parser.add_argument("--steps", type=int, help="steps of training (default: 1200)")
    parser.add_argument(
        "--probe",
        metavar="FILE",
        help="labelled texts (JSON lines with text and label), or .npz with vectors and labels: how well single "
        "features tell the classes",
    )
    runs.add_arguments(parser, "interpret/sae")


def _sae(args: argparse.Namespace, overrides: list[str]) -> None:
    import jax

    from subspace_jax import train
    from subspace_jax.interpret.polysae import explain, run

    config = _config(args, overrides)
    if runs.shown_only(args, overrides, config):
        return
    probe = _probe(args.probe, vectors=run.takes_vectors(config)) if args.probe else None
    result = train.run(
        config, args.workdir, progress=not args.quiet, restart=args.restart, change_seed=args.change_seed
    )
    if jax.process_count() > 1:
        if jax.process_index() == 0:
            print(f"Wrote checkpoints to {args.workdir}; the same command on one process writes the report")
        return
    runs.say(args, "Report: finding where features are active …")
    figures = explain.explain(config, result.state, result.metrics, args.workdir, probe=probe)
    shared.write_result(args.workdir, figures)
    print("; ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    print(f"Wrote report.html, features.json, result.json and checkpoints to {os.path.abspath(args.workdir)}")
    if config.model.decoder == "linear":
        print(f"Wrote the autoencoder for SAELens to {os.path.join(os.path.abspath(args.workdir), 'sae_lens')}")


def _probe(path: str, *, vectors: bool):
    """The labelled texts or vectors of a file."""
    from subspace_jax import represent
    from subspace_jax.interpret.polysae import explain

    try:
        if vectors:
            return explain.read_labelled_vectors(path)
        texts = represent.read_labelled_texts(path)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"--probe: {error}") from error
    if texts.labels is None:
        raise ValueError(f"--probe: {path}: expected a label for each text, got none")
    return texts


def _config(args: argparse.Namespace, overrides: list[str]):
    """The config with what the flags say."""
    from subspace_jax import train

    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps: expected at least 1, got {args.steps}")
    given = {field: getattr(args, name) for name, field in _FLAGS.items() if getattr(args, name) is not None}
    if args.model:
        shared.check_model_folder(args.model)
        given["model.tokenizer"] = shared.tokenizer_of(args.model)
    source = args.data or ""
    if not args.model and args.config == "interpret/sae" and (source.endswith(".npy") or os.path.isdir(source)):
        from subspace_jax import data

        given["data.batch_size"] = max(1, min(_VECTORS, len(data.VectorShards(source, name="data.source")) // 2))
    fields = [f"{field}={value}" for field, value in given.items()]
    config = train.override(train.load_config(args.config), [*fields, *runs.settings(args, overrides)])
    if "d_sae" not in config.get("model", {}):
        raise ValueError(f"--config {args.config}: expected a config of an autoencoder (it has no field model.d_sae)")
    if config.model.folder:
        shared.check_model_folder(config.model.folder)
    elif args.layer is not None and not config.model.size:
        raise ValueError(f"--layer {args.layer}: expected --model, the language model whose layer it is")
    elif not config.model.size and not config.data.source.endswith(".npy") and not os.path.isdir(config.data.source):
        raise ValueError(
            f"--model: expected a language model for the texts of --data {config.data.source}; without one --data is "
            "an .npy file of vectors or a folder of them"
        )
    return config
