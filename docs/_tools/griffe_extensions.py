"""A Griffe extension for mkdocstrings: links from roles, descriptions from elsewhere, functions named like modules."""

import contextlib
import re
from collections.abc import Iterator

import griffe

_ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|obj):`~?([\w.]+)`")
# An entry of a section of arguments that only refers to a function or class, which describes it.
_REFERRED = re.compile(
    r"^(?P<indent> +)(?P<name>\w+): (?:See|(?P<more>This and other arguments: see)) "
    r"(?P<role>:\w+:`~?(?P<of>[\w.]+)`)\.",
    re.MULTILINE,
)


class Reference(griffe.Extension):
    """Prepares a package for the reference.

    Roles such as ``:func:`name` `` in docstrings become links, or code where the reference does not show the name.  An
    argument whose description is "See :func:`name`." gets the one that it has there.  A package that exports the
    function ``polar`` of its module ``polar`` shows the function, to which the name refers in Python.
    """

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """Changes docstrings and members in place."""
        del kwargs
        objects = list(_walk(pkg))
        documented = [obj for obj in objects if obj.docstring]
        described = {obj.path: _described(pkg, obj, obj.docstring.value) for obj in documented}
        for obj in documented:
            text = described[obj.path]
            obj.docstring.value = _ROLE.sub(lambda match, obj=obj: _link(obj, match[1]), text)
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


def _described(pkg: griffe.Module, obj: griffe.Object, text: str) -> str:
    """The docstring of an object with the descriptions of arguments that it refers to."""

    def describe(match: re.Match) -> str:
        description = _argument(pkg, obj, match["of"], match["name"])
        if description is None:
            return match[0]
        seen = f"See {match['role']} for this and other arguments." if match["more"] else f"See {match['role']}."
        return f"{match['indent']}{match['name']}: {description} {seen}"

    return _REFERRED.sub(describe, text)


def _argument(pkg: griffe.Module, obj: griffe.Object, of: str, name: str) -> str | None:
    """The description of an argument or attribute in the docstring of another object, None if it has none."""
    try:
        target = pkg[_resolved(obj, of).removeprefix(f"{pkg.path}.")]
        if target.is_module:
            target = target.members.get(target.name) or pkg[target.parent.imports[target.name].partition(".")[2]]
    except (griffe.AliasResolutionError, KeyError):
        return None
    if target.path == obj.path or not target.docstring:
        return None
    entry = re.search(rf"^( +){name}: (.*(?:\n\1 +.*)*)", target.docstring.value, re.MULTILINE)
    if entry is None:
        return None
    if further := _REFERRED.match(entry[0]):
        return _argument(pkg, target, further["of"], name)
    return re.sub(r"\s*\n\s*", " ", entry[2])


def _link(obj: griffe.Object, name: str) -> str:
    return f'<autoref identifier="{_resolved(obj, name)}" optional><code>{name}</code></autoref>'


def _resolved(obj: griffe.Object, name: str) -> str:
    """The path of a name in a docstring: one that its module knows, or a package above it."""
    if name.startswith("subspace_jax."):
        return name
    with contextlib.suppress(griffe.NameResolutionError):
        return obj.resolve(name)
    package = obj.module.parent
    while package is not None:
        if name.partition(".")[0] in package.members:
            return f"{package.path}.{name}"
        package = package.parent
    return f"{obj.module.path}.{name}"
