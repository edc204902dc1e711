"""Dialects without a download: the message catalogues of Django."""

import functools
import gettext
import importlib.util
import zlib
from collections.abc import Sequence
from pathlib import Path

from subspace_jax.data.text.records import DomainCompletion

SPANISH = ("es", "es_AR", "es_CO", "es_MX", "es_VE")


def dialects(locales: Sequence[str] = SPANISH, split: str = "train") -> list[DomainCompletion]:
    """Returns the messages of Django's programs with their translations into some dialects of a language.

    A prompt is the dialect and the English message, ``"es_AR: Please correct the error below. = "``, and the domain is
    the dialect.  A tenth of the messages, by a hash of the English, is the split "validation", the same in every
    dialect.  The result depends on the installed version: Django 5.2 gives 3,600 translations into five varieties of
    Spanish of 120,000 characters in all; of those into Argentinian Spanish 6 in 10 differ from the Spanish of Spain.

    Args:
      locales: Names of Django's locales.
      split: "train" or "validation".

    Returns:
      One example for each message and dialect, plural forms apart, without duplicates.

    Raises:
      ImportError: Django is not installed.
      ValueError: Django has no such locale, or the split is unknown.
    """
    if isinstance(locales, str):
        raise ValueError(f"locales: expected names in a list, got {locales!r}")
    if split not in ("train", "validation"):
        raise ValueError(f"split: expected 'train' or 'validation', got {split!r}")
    wanted = split == "validation"
    found = {}
    for locale in locales:
        for message, translation in _catalogue(locale):
            if (zlib.crc32(message.encode()) % 10 == 0) == wanted:
                found[DomainCompletion(f"{locale}: {message} = ", translation, locale)] = None
    return list(found)


@functools.cache
def _catalogue(locale: str) -> tuple[tuple[str, str], ...]:
    spec = importlib.util.find_spec("django")
    if spec is None:
        raise ImportError('the dialects are of Django: pip install "subspace-jax[real]"')
    root = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(root.rglob(f"locale/{locale}/LC_MESSAGES/*.mo"))
    if not files:
        raise ValueError(f"locales: Django has no locale {locale!r}")
    pairs = {}
    for file in files:
        with file.open("rb") as stream:
            messages = gettext.GNUTranslations(stream)._catalog
        for key, translation in messages.items():
            message = key[0] if isinstance(key, tuple) else key  # of a plural, with the number of the form
            message = message.rpartition("\x04")[2]  # behind the context
            if message and translation:
                pairs[message, translation] = None
    return tuple(sorted(pairs))
