"""Which layers are quantized how: one group a scheme, as the quantization_config of a folder lists them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyqkern.schemes import Scheme


@dataclass
class Group:
    """The layers that one scheme quantizes; scheme None: the linears that are kept in float.

    linears: their names; of experts, "<name>.gate_up_proj" and "<name>.down_proj". embeddings: name -> name of its
    table, "<name>.table", or that of an embedding with which it shares it. heads: linears tied to an embedding, name ->
    name of that table. recurrent: names of recurrent layers.
    """

    scheme: Scheme | None
    linears: list[str] = field(default_factory=list)
    embeddings: dict[str, str] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    recurrent: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        scheme = None if self.scheme is None else self.scheme.to_dict()
        said = {
            "scheme": scheme,
            "linears": list(self.linears),
            "embeddings": dict(self.embeddings),
            "heads": dict(self.heads),
        }
        return said | ({"recurrent": list(self.recurrent)} if self.recurrent else {})

    def names(self) -> list[str]:
        """All layers."""
        return [*self.linears, *self.embeddings, *self.heads, *self.recurrent]

    def modules(self) -> list[str]:
        """The names of the modules whose tensors the files hold: linears, tables of embeddings, recurrent layers."""
        if self.scheme is None:
            return []
        tables = [table for name, table in self.embeddings.items() if table == f"{name}.table"]
        return [*self.linears, *tables, *self.recurrent]


_WEIGHT = re.compile(r"(.*)\.weight(_(ih|hh|hr)(_l\d+(_reverse)?)?)?")


def module_of(key: str) -> str | None:
    """The name of the module whose codes a file may have under `key`; None for other tensors."""
    found = _WEIGHT.fullmatch(key)
    return None if found is None else found[1]


def groups_from(said: Any) -> list[Group]:
    """What `Group.to_dict` wrote, checked. ValueError for anything else."""
    if not isinstance(said, list):
        raise ValueError(f"layers must be a list of objects, one a scheme, got {type(said).__name__}")
    groups = [_group_from(one) for one in said]
    names = [name for group in groups for name in group.names()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"layers must name each layer once, got {twice!r} twice")
    tables = {name for group in groups for name in group.modules()}
    for group in groups:
        for name, table in (group.embeddings | group.heads).items():
            if table not in tables:
                raise ValueError(f"layers must name the table of {name!r}, got {table!r}, which is no embedding's")
    return groups


def _group_from(said: Any) -> Group:
    if not isinstance(said, dict) or said.keys() - {"recurrent"} != {"scheme", "linears", "embeddings", "heads"}:
        raise ValueError(f"layers must hold objects of scheme, linears, embeddings and heads, got {said!r:.200}")
    linears, embeddings, heads, recurrent = (
        said.get(key, []) for key in ("linears", "embeddings", "heads", "recurrent")
    )
    for what, names in (("linears", linears), ("recurrent", recurrent)):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{what} must be a list of names, got {names!r:.200}")
    for what, names in (("embeddings", embeddings), ("heads", heads)):
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{what} must map names to names of tables, got {names!r:.200}")
    if said["scheme"] is None:
        if embeddings or heads or recurrent:
            raise ValueError("layers without a scheme must be linears, got embeddings, heads or recurrent layers")
        return Group(None, linears)
    return Group(scheme_from(said["scheme"]), linears, embeddings, heads, recurrent)


def scheme_from(said: Any) -> Scheme:
    """The scheme that `Scheme.to_dict` wrote; its options have the types of the defaults. ValueError for others."""
    if not isinstance(said, dict | str) or (isinstance(said, dict) and not isinstance(said.get("name"), str)):
        raise ValueError(f"scheme must be an object with a name, got {said!r:.200}")
    options = dict(said) if isinstance(said, dict) else {"name": said}
    default = Scheme.from_dict({"name": options["name"]})
    for name, value in options.items():
        wanted = type(getattr(default, name, value))
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(f"{name} of the scheme {default.name!r} must be {wanted.__name__}, got {value!r:.200}")
    try:
        return Scheme.from_dict(options)
    except TypeError as error:
        raise ValueError(f"scheme: {error}") from error


def renamed(groups: list[Group], rename: Callable[[str], str]) -> list[Group]:
    """The same groups under other names of their modules; a table is called after its embedding."""

    def table(name: str) -> str:
        return rename(name.removesuffix(".table")) + ".table"

    return [
        Group(
            group.scheme,
            [rename(name) for name in group.linears],
            {rename(name): table(of) for name, of in group.embeddings.items()},
            {rename(name): table(of) for name, of in group.heads.items()},
            [rename(name) for name in group.recurrent],
        )
        for group in groups
    ]
