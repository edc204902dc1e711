"""A Griffe extension, which mkdocstrings loads: links from Sphinx roles, and functions named like their file."""

import re
from collections.abc import Iterator

import griffe

_ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|obj):`~?([\w.]+)`")


class Reference(griffe.Extension):
    """Prepares a package for the reference.

    The ``:func:`name` `` of docstrings become links to what the reference shows, and code where it shows nothing.  A
    package that exports the function ``polar`` of its file ``polar.py`` shows the function, as in Python it is what
    the name means.
    """

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """Changes docstrings and members in place."""
        del kwargs
        objects = list(_walk(pkg))
        for obj in objects:
            if obj.docstring:
                obj.docstring.value = _ROLE.sub(lambda match, obj=obj: _link(obj, match[1]), obj.docstring.value)
        modules = [obj for obj in objects if obj.is_module]
        # Aliases are looked up by path, and paths lead through the files that are about to give way.
        for module in modules:
            for member in module.members.values():
                if member.is_alias and member.target_path.startswith(f"{pkg.path}."):
                    member.resolve_target()
        for module in modules:
            for name in module.exports or ():
                if isinstance(name, str) and name in module.modules and name in module.modules[name].functions:
                    module.members[name] = griffe.Alias(name, module.modules[name].functions[name], parent=module)


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
