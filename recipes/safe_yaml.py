"""YAML from strangers: no code, no alias bombs, no keys that silently overwrite each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from ..errors import UserError

MAX_BYTES = 256 * 1024
MAX_NODES = 100_000


def parse_yaml(text: str, name: str) -> Any:
    """The plain values (dict, list, str, int, float, bool, None) that `text` holds.

    Raises UserError, starting with `name`, when the text is longer than 256 KiB, is not YAML, asks for
    Python objects, has more than 100,000 nodes once its aliases are expanded, or repeats a key.
    """
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise UserError(f"{name}: larger than {MAX_BYTES // 1024} KiB; a recipe is a few KiB")
    try:
        return _load(yaml.SafeLoader(text), name)
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not valid YAML: {_one_line(error)}") from None
    except (ValueError, OverflowError) as error:  # a date such as 2024-99-99
        raise UserError(f"{name}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deeply for a recipe") from None


def _load(loader: yaml.SafeLoader, name: str) -> Any:
    root = loader.get_single_node()
    if root is None:
        return None
    _check_size(root, name)
    _check_keys(root, name)
    return loader.construct_document(root)


def dump_yaml(value: Any) -> str:
    """`value` as YAML in its own key order, without aliases; innermost lists on one line."""
    return yaml.dump(
        value, Dumper=_PlainDumper, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True
    )


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None
    if any(character in text for character in "\x85\u2028\u2029"):
        style = '"'  # PyYAML folds these rare line breaks wrongly in any other style
    elif ":" in text and "\n" not in text:
        style = "'"  # 2:4 is a number in base 60 to some YAML readers, and had better never stand bare
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_PlainDumper.add_representer(str, _represent_text)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _check_size(root: yaml.Node, name: str) -> None:
    """Count nodes as if every alias were written out, without writing them out."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise UserError(f"{name}: an alias contains itself")
        open_nodes.add(id(node))
        total = 1 + sum(size(child) for child in _children(node))
        open_nodes.discard(id(node))
        if total > MAX_NODES:
            raise UserError(f"{name}: its aliases expand to more than {MAX_NODES:,} values")
        sizes[id(node)] = total
        return total

    size(root)


def _check_keys(root: yaml.Node, name: str) -> None:
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        pending.extend(_children(node))
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated(node, name)


def _refuse_repeated(node: yaml.MappingNode, name: str) -> None:
    keys: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if key.value in keys:
            line = key.start_mark.line + 1
            raise UserError(f"{name}: {key.value} is there twice in one mapping (line {line}); rename one")
        keys.add(key.value)


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1})" if mark else problem
