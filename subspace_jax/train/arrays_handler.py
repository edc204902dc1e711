"""An Orbax handler of arrays that also writes digests of the files; imported with Orbax, where checkpoints are used."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from subspace_jax.train import digests


class ArraysHandler(ocp.StandardCheckpointHandler):
    """Orbax's handler of arrays, which also writes the digests of the files of this process."""

    async def async_save(self, directory, *args, **kwargs):
        """Writes the arrays; see Orbax."""
        futures = await super().async_save(directory, *args, **kwargs)
        return [*(futures or []), _OwnDigests(directory)]


@ocp.args.register_with_handler(ArraysHandler, for_save=True)
class ArraysSave(ocp.args.StandardSave):
    """What :class:`ArraysHandler` writes."""


@ocp.args.register_with_handler(ArraysHandler, for_restore=True)
class ArraysRestore(ocp.args.StandardRestore):
    """What :class:`ArraysHandler` reads."""


class _OwnDigests:
    """An Orbax future that comes after those of the arrays: Orbax awaits them in order, so the files are complete."""

    def __init__(self, folder):
        self._folder = folder

    def result(self, timeout: float | None = None) -> None:
        digests.write_own(Path(getattr(self._folder, "path", self._folder)), jax.process_index())

    def cancel(self) -> None:
        pass
