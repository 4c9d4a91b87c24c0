"""Makes of this project's docstrings what mkdocstrings renders: an extension of griffe, named in mkdocs.yml.

A docstring describes parameters as `name: text` or `name, name: text` at the start of a sentence, and has its examples
as doctests. Here these become a list and blocks of code in Markdown; all other text stays as it is.
"""

import re
import textwrap
from typing import Any

import griffe

# "name: ", "name, name: " or "*name: " at the start of a sentence.
ENTRY = re.compile(r"(?:^|(?<=[.;)] ))(\*{0,2}\w+(?:, \*{0,2}\w+)*): (?=\S)")


COMPILED = {"isa", "isas"}  # of these there is no source in Python


class HouseStyle(griffe.Extension):
    """Rewrites every docstring of a package when it has been read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        public = {name for name in map(str, pkg.exports or ()) if name in pkg.members}
        rewrite(pkg, {name for name in public if not pkg.members[name].is_module} - COMPILED)


def rewrite(obj: Any, public: set[str]) -> None:
    if obj.docstring is not None:
        obj.docstring.value = markdown(obj.docstring.value, described(obj), public)
    for member in obj.members.values():
        if not member.is_alias:
            rewrite(member, public)


def described(obj: Any) -> set[str]:
    """The names that a docstring may describe: parameters of a function; of a class those of __init__, and members."""
    if obj.is_function:
        return {parameter.name for parameter in obj.parameters}
    if not obj.is_class:
        return set()
    return {*obj.members, *(parameter.name for parameter in obj.parameters)}


def markdown(docstring: str, known: set[str], public: set[str]) -> str:
    """The docstring with its entries as a list, examples and indented lines as blocks of code, and links to what
    pyqkern names in public.
    """
    parts = []
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        if paragraph.startswith(">>> "):
            parts.append(f"```pycon\n{paragraph}\n```")
        elif all(line.startswith("    ") for line in paragraph.splitlines()):
            parts.append(f"```text\n{textwrap.dedent(paragraph)}\n```")
        else:
            parts.append(linked(listed(paragraph, known), public))
    return "\n\n".join(parts)


def linked(text: str, public: set[str]) -> str:
    return re.sub(r"`(?:pyqkern\.)?(\w+)`", lambda m: f"[{m[0]}][pyqkern.{m[1]}]" if m[1] in public else m[0], text)


def listed(paragraph: str, known: set[str]) -> str:
    """What stands before the first entry, and a list of the entries. Without entries lines stay."""
    text = " ".join(line.strip() for line in paragraph.splitlines())
    found = [match for match in ENTRY.finditer(text) if set(match[1].replace("*", "").split(", ")) <= known]
    if not found:
        return paragraph
    prose = text[: found[0].start()].strip()
    ends = [match.start() for match in found[1:]] + [len(text)]
    entries = []
    for match, end in zip(found, ends, strict=True):
        names = ", ".join(f"`{name}`" for name in match[1].split(", "))
        entries.append(f"- {names}: {text[match.end() : end].strip()}")
    return "\n".join([prose, "", *entries] if prose else entries)
