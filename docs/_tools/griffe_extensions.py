"""A Griffe extension for mkdocstrings: links from Sphinx roles, and functions that are named like their module."""

import contextlib
import re
from collections.abc import Iterator

import griffe

_ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|obj):`~?([\w.]+)`")


class Reference(griffe.Extension):
    """Prepares a package for the reference.

    Roles such as ``:func:`name` `` in docstrings become links, or code where the reference does not show the name.  A
    package that exports the function ``polar`` of its module ``polar`` shows the function, to which the name refers in
    Python.
    """

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """Changes docstrings and members in place."""
        del kwargs
        objects = list(_walk(pkg))
        for obj in objects:
            if obj.docstring:
                obj.docstring.value = _ROLE.sub(lambda match, obj=obj: _link(obj, match[1]), obj.docstring.value)
        modules = [obj for obj in objects if obj.is_module]
        # Aliases are resolved by path, through the modules that are about to be replaced.
        for module in modules:
            for member in module.members.values():
                if member.is_alias and member.target_path.startswith(f"{pkg.path}."):
                    # Griffe does not know names that are assigned as a tuple.
                    with contextlib.suppress(griffe.AliasResolutionError):
                        member.resolve_target()
        shadowed = [
            (module, name, pkg[path.removeprefix(f"{pkg.path}.")])
            for module in modules
            for name, path in module.imports.items()
            if name in (module.exports or ()) and name in module.modules and path != module.modules[name].path
        ]
        for module, name, target in shadowed:
            module.members[name] = griffe.Alias(name, target, parent=module)


def _walk(obj: griffe.Object) -> Iterator[griffe.Object]:
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _walk(member)


def _link(obj: griffe.Object, name: str) -> str:
    target = name
    if not name.startswith("subspace_jax."):
        try:
            target = obj.resolve(name)
        except griffe.NameResolutionError:
            target = f"{obj.module.path}.{name}"
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'
