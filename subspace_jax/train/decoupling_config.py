"""Builds a decoupler from the fields of a config."""

import dataclasses
from collections.abc import Sequence

from ml_collections import ConfigDict

from subspace_jax.losses.decoupling import OnlineDecoupler
from subspace_jax.train.fields import check_at_least, check_choice


def default_decoupling() -> ConfigDict:
    """Returns the fields ``decoupling`` of a config, for :func:`decoupler_of`.

    ``target`` is the name of the dominant domain; empty, nothing is decoupled.  ``weight`` is the factor on the
    penalty, which is estimated and reported at 0 too.  The others are those of
    :class:`subspace_jax.losses.decoupling.OnlineDecoupler`.
    """
    fields = {field.name: field.default for field in dataclasses.fields(OnlineDecoupler)}
    del fields["num_domains"]
    return ConfigDict({**fields, "target": "", "weight": 0.01})


def decoupler_of(config: ConfigDict, domains: Sequence[str]) -> OnlineDecoupler:
    """Returns the decoupler that the fields of :func:`default_decoupling` describe.

    Args:
      config: The fields; it may have others.
      domains: Names of the domains, in the order of their labels.

    Raises:
      ValueError: There is one domain only, ``target`` is none of them, ``weight`` is negative, or another field is out
        of range; the message names it.
    """
    if len(domains) < 2:
        raise ValueError(f"decoupling: expected examples of at least two domains, got {list(domains)}")
    check_choice("decoupling.target", config.target, domains)
    check_at_least("decoupling.weight", config.weight, 0)
    fields = {field.name: config[field.name] for field in dataclasses.fields(OnlineDecoupler) if field.name in config}
    try:
        return OnlineDecoupler(**{**fields, "num_domains": len(domains), "target": list(domains).index(config.target)})
    except ValueError as error:
        raise ValueError(f"decoupling.{error}") from error
