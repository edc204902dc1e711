"""Bad values, damaged files, and limits in time and memory, for the tests of this folder."""

import contextlib
import copy
import json
import pathlib
import signal
import time

SECONDS, BYTES = 10.0, 2**30

VALUES = (
    None, True, -1, 0, 1, 3, 7, 2**31 - 1, 2**63, 10**9, 10**18, 0.5, -0.5, 1e300, float("nan"), float("inf"),
    "", "x", "3", "nan", "../../x", "\x00", "ß" * 5000, [], [1], [None], ["x", "x"], [10**9] * 3,
    {}, {"x": 1}, {"r": [{}]},
)  # fmt: skip


def fields_of(tree, path=()):
    """Yields the path of every field of a nested dict, inner dicts too."""
    for name, value in tree.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from fields_of(value, (*path, name))


def mutate_fields(rng, tree):
    """Returns a copy with one field replaced, removed or put twice as deep, and what was done."""
    tree = copy.deepcopy(tree)
    paths = list(fields_of(tree))
    *outer, name = paths[rng.integers(len(paths))]
    node = tree
    for part in outer:
        node = node[part]
    where = ".".join((*outer, name))
    if rng.random() < 0.1:
        del node[name]
        return tree, f"{where} removed"
    value = VALUES[rng.integers(len(VALUES))]
    node[name] = value
    return tree, f"{where} = {str(value)[:40]!r} ({type(value).__name__})"


def damage_text(rng, text):
    """Returns the bytes of a text file that something has spoilt."""
    kind = rng.integers(7)
    raw = text.encode()
    at = int(rng.integers(max(len(raw), 1)))
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return b""
    if kind == 2:
        return b"\xff\xfe" + raw
    if kind == 3:
        return b"[" * 100_000
    if kind == 4:
        return b"null"
    if kind == 5:
        return raw[:at] + bytes(rng.integers(0, 256, 8, dtype="uint8")) + raw[at:]
    return b"[" + raw + b"]"


def damage_bytes(rng, raw):
    """Returns a file with a flipped bit, a cut end, a hole of zeros or bytes that do not belong there."""
    kind, at = rng.integers(5), int(rng.integers(max(len(raw), 1)))
    if kind == 0 and raw:
        return raw[:at] + bytes([raw[at] ^ (1 << int(rng.integers(8)))]) + raw[at + 1 :]
    if kind == 1:
        return raw[:at]
    if kind == 2:
        return raw[:at] + bytes(min(64, len(raw) - at)) + raw[at + 64 :]
    if kind == 3:
        return raw + b"\x00" * 7
    return b""


def copy_folder(source, target):
    """Copies the files of a folder, without its folders."""
    target.mkdir(parents=True)
    for file in pathlib.Path(source).iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return target


def write_json(file, tree):
    """Writes JSON with the NaN and Infinity that Python's reader takes."""
    file.write_text(json.dumps(tree))


@contextlib.contextmanager
def bounded():
    """Fails where the block takes over ten seconds, or over a gigabyte more memory than there was.

    Seconds of the clock and of the processor both, for other work on the machine takes the former.
    """

    def too_long(*_):
        raise AssertionError(f"took more than {3 * SECONDS:.0f} s")

    before_signal = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(int(3 * SECONDS))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak of memory is counted from here
    before, start = _peak(), (time.monotonic(), time.process_time())
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before_signal)
    took = min(time.monotonic() - start[0], time.process_time() - start[1])
    assert took < SECONDS, f"took {took:.1f} s"
    assert _peak() - before < BYTES, f"took {(_peak() - before) / 2**30:.2f} GiB"


def _peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def refusal(error):
    """What is wrong with an error that a user gets for bad input; an empty string where nothing is."""
    text = str(error)
    if not isinstance(error, ValueError | OSError):
        return f"{type(error).__name__}: {text[:200]}"
    if isinstance(error, UnicodeError | json.JSONDecodeError):
        return f"an error of a reader, {type(error).__name__}: {text[:200]}"
    return "" if text.strip() and len(text) < 2000 else f"a message of {len(text)} characters"
