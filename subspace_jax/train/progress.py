"""How a run is shown: a bar on a terminal, elsewhere a line every half a minute."""

import contextlib
import datetime
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from subspace_jax.train.interruptions import Lasting

log = logging.getLogger(__name__)

LINE_EVERY = 30.0  # seconds between two lines
_OTHERS = 3  # metrics of a line beside loss, learning rate and norm of the gradient
_SHORT = {"learning_rate": "lr", "grad_norm": "grad norm"}
_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def progress_bar(total: int, start: int, *, show: bool) -> tqdm:
    """Returns a progress bar with steps and time left."""
    stream = Lasting(sys.stderr)
    return tqdm(
        total=total, initial=start, disable=not show, miniters=1, file=stream, dynamic_ncols=True, bar_format=_BAR
    )


def is_live() -> bool:
    """Returns whether a bar can be shown: on a terminal or in a notebook, not in a file."""
    in_notebook = any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__)
    return in_notebook or sys.stderr.isatty()


class Progress:
    """Shows steps, metrics, speed and time left; on process 0 only.

    Args:
      total: Steps of the run.
      start: Step at which it begins.
      show: Whether to show anything but evaluations, which are logged in any case.
    """

    def __init__(self, total: int, start: int, *, show: bool):
        self._total, self._step = total, 0
        self._first = jax.process_index() == 0
        self._shown = show and self._first
        self._pace = _Pace(total)
        self._bar = progress_bar(total, start, show=self._shown and is_live())
        self._lines = self._shown and not is_live()
        self._rows_said = -LINE_EVERY  # when a row was a line
        self._heard = time.monotonic()  # when there was a line, or a row that could be one

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Within it messages make way for the bar, which is closed at its end."""
        with logging_redirect_tqdm(), contextlib.closing(self._bar):
            self._describe("compilation")
            yield

    def say(self, text: str) -> None:
        """Logs a text, or writes it where nobody listens to the log."""
        if log.isEnabledFor(logging.INFO):
            if self._first:
                log.info("%s", text)
        elif self._shown:
            tqdm.write(text, file=Lasting(sys.stderr))
            Lasting(sys.stderr).flush()

    def step(self, step: int, amount: tuple[int, str]) -> None:
        """Counts a step of so many examples, tokens or images."""
        if not self._step:  # it has compiled
            self._heard = time.monotonic()
            self._describe("")
        self._step = step
        self._pace.step(step, amount)
        self._bar.update()
        if self._lines and time.monotonic() - self._heard >= LINE_EVERY:  # rows are rarer than that
            self._line(step, {})

    def evaluating(self, name: str) -> None:
        """Shows that an evaluator runs."""
        self._pace.pause()
        self._describe("evaluation" if name == "eval" else f"evaluation {name}")

    def trained(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the metrics of a step."""
        self._heard = time.monotonic()
        if self._lines and (self._heard - self._rows_said >= LINE_EVERY or step == self._total):
            self._rows_said = self._heard
            self._line(step, values)
        elif self._shown and not self._lines:
            self._bar.set_postfix_str("  ".join([*_texts(values, others=0), *self._pace.speed()]), refresh=False)

    def evaluated(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Shows what an evaluator or the summary of a run gives."""
        self._pace.go_on()
        self._heard = time.monotonic()
        self._describe("")
        self.say(f"{self._head(step)}  {split}: {'  '.join(_texts(values, others=len(values)))}")

    def _describe(self, text: str) -> None:
        self._bar.set_description_str(text and f"{text}: ")

    def _line(self, step: int, values: Mapping[str, float]) -> None:
        self._heard = time.monotonic()
        self.say("  ".join([self._head(step), *_texts(values), *self._pace.speed(), *self._pace.left(step)]))

    def _head(self, step: int) -> str:
        return f"step {step:>{len(str(self._total))}}/{self._total}"


class _Pace:
    """Speed and time left, from the clock of the host."""

    def __init__(self, total: int):
        self._total = total
        self._begun: tuple[int, float] | None = None  # first step, which compiles, and when it was handed on
        self._since, self._amount, self._unit = 0.0, 0, "examples"
        self._paused: float | None = None

    def step(self, step: int, amount: tuple[int, str]) -> None:
        if self._begun is None:
            self._begun = step, time.monotonic()
            self._since = self._begun[1]
        else:
            self._amount, self._unit = self._amount + amount[0], amount[1]

    def pause(self) -> None:
        """Begins a time that is none of steps."""
        self._paused = time.monotonic() if self._paused is None else self._paused

    def go_on(self) -> None:
        if self._paused is not None:
            self._since += time.monotonic() - self._paused
            self._paused = None

    def speed(self) -> list[str]:
        """Returns the speed since the last call, if it is known."""
        now = time.monotonic()
        seconds, amount = now - self._since, self._amount
        self._since, self._amount = now, 0
        if not amount or seconds <= 0:
            return []
        rate = amount / seconds
        return [f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s"]

    def left(self, step: int) -> list[str]:
        """Returns the time left at the pace until now, with evaluations and checkpoints."""
        if self._begun is None or step <= self._begun[0] or step >= self._total:
            return []
        each = (time.monotonic() - self._begun[1]) / (step - self._begun[0])
        return [f"{datetime.timedelta(seconds=round(each * (self._total - step)))} left"]


def _texts(values: Mapping[str, float], others: int = _OTHERS) -> list[str]:
    """Returns metrics as texts: loss, learning rate, norm of the gradient, then others."""
    first = [name for name in ("loss", *_SHORT) if name in values]
    rest = [name for name in values if name not in first and name != "skipped"][:others]
    return [f"{_SHORT.get(name, name)} {values[name]:.4g}" for name in (*first, *rest)]


def amount_of(batch: Mapping[str, Any]) -> tuple[int, str]:
    """Returns how much a batch holds, and the unit: tokens of sequences, images, or examples.

    Args:
      batch: Arrays or shapes.
    """
    inputs = batch.get("inputs", next(iter(batch.values())))
    labels = batch.get("labels")
    if len(inputs.shape) == 2 and labels is not None and labels.shape == inputs.shape and "iu".find(_kind(inputs)) >= 0:
        return inputs.shape[0] * inputs.shape[1], "tokens"
    return inputs.shape[0], "images" if len(inputs.shape) == 4 else "examples"


def _kind(x: Any) -> str:
    return jax.numpy.dtype(x.dtype).kind
