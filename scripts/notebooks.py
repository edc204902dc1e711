"""Runs the notebooks of colabs/ and stores their outputs, with the badge and the install cell that all of them share.

    python scripts/notebooks.py                        # all in full: ten minutes, most of them for smollm2
    python scripts/notebooks.py adapters grassmann     # some
    python scripts/notebooks.py --fast                 # in fast mode, as the tests do

``tests/colabs`` checks that notebooks are stored as this script leaves them.
"""

import argparse
import base64
import io
import os
import pathlib
import sys

import nbformat
from nbclient import NotebookClient
from PIL import Image

# Owner and name on GitHub, for badges and install cells: set it, and run this script.
REPOSITORY = "OWNER/subspace_jax"

COLABS = pathlib.Path(__file__).parents[1] / "colabs"
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"
URL = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/colabs/{{name}}.ipynb"
INSTALL = f"""\
import glob
import importlib.util
import os
import warnings

if importlib.util.find_spec("subspace_jax") is None:
    # A wheel beside the notebook, or else the repository.
    wheels = sorted(glob.glob("subspace_jax-*.whl"))
    source = f"./{{wheels[-1]}}[train]" if wheels else "subspace-jax[train] @ git+https://github.com/{REPOSITORY}"
    %pip install -q "{{source}}"
warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are plain text without ipywidgets"""


def read(path):
    return nbformat.read(path, as_version=4)


def badge(path):
    """The line above the title of a notebook."""
    return BADGE.format(url=URL.format(name=path.stem))


def execute(notebook, folder, env):
    """Runs a notebook in place, by the kernel of this environment, with the working directory ``folder``."""
    # Other installed kernels are not asked, and shell commands are those of this environment.
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline", "PATH": path, **env}
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=resources, record_timing=False)
    client.execute(env=env)


def share(path, notebook):
    """Sets the badge and the install cell."""
    title, install = notebook.cells[:2]
    text = title.source.split("\n\n", 1)[1] if title.source.startswith("[![") else title.source
    title.source = f"{badge(path)}\n\n{text}"
    install.source = INSTALL


def slim(notebook):
    """Drops progress bars and warnings, and reduces pictures to 128 colors."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = _reduced(output.data["image/png"])
    notebook.metadata.language_info = {"name": "python"}


def _reduced(png):
    picture, buffer = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    picture.convert("RGB").quantize(128).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in COLABS.glob("*.ipynb"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (default: all of {', '.join(names)})")
    parser.add_argument("--fast", action="store_true", help="fewer steps, a tiny checkpoint")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(names):
        parser.error(f"NAME: expected some of {names}, got {sorted(unknown)}")
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    for name in args.names or names:
        path = COLABS / f"{name}.ipynb"
        notebook = read(path)
        share(path, notebook)
        execute(notebook, COLABS, {"SUBSPACE_JAX_FAST": "1" if args.fast else "0"})
        slim(notebook)
        nbformat.write(notebook, path)
        print(f"{path.relative_to(COLABS.parent)}  {path.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
