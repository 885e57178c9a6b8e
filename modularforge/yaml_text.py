"""The one reader and writer of YAML: settings files, study files, values of ``--set``, resolved settings.

Plain words mean what YAML 1.2's core schema says: `true`, `null`, `12`, `1e-3`. All else is text, so `yes`, `12:00:00`,
`010`, `0x10`, `1_000` and `2001-02-30` reach the settings as they were written, and settings that want a number refuse
them. A name that is there twice is refused. Whatever the input, the only failure is a ValueError that says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml.nodes import Node, ScalarNode

MAX_ENTRIES = 100_000
MAX_BYTES = 2 * 1024 * 1024  # a list of 20,000 files; the parser takes seconds for more
# Of what aliases stand for, in entries and characters together: a few lines can stand for more than any memory holds.
MAX_WEIGHT = 4 * 1024 * 1024
MAX_DEPTH = 64  # ours are 6 deep at most; the limit is the same in every Python, whose own comes as a RecursionError
MAX_DIGITS = 300  # of a whole number: more than any floating-point number has before its point

LINE_ENDS = re.compile("[\\r\\x85\\u2028\\u2029]")
SURROGATE = re.compile("[\ud800-\udfff]")
TAG = "tag:yaml.org,2002:"
# YAML 1.2.2, section 10.3.2, without its octal and hexadecimal numbers; whole numbers have no leading zeros.
PLAIN = {
    "null": (re.compile(r"(~|null|Null|NULL)?"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    "int": (re.compile(r"[-+]?(0|[1-9][0-9]*)"), list("-+0123456789")),
    "float": (
        re.compile(
            r"[-+]?(\.[0-9]+([eE][-+]?[0-9]+)?|(0|[1-9][0-9]*)(\.[0-9]*([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)"
            r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
        ),
        list("-+.0123456789"),
    ),
    "merge": (re.compile(r"<<"), ["<"]),
}


class Loader(yaml.SafeLoader):
    """YAML 1.2's plain words, names that occur once, limits on depth and on what aliases stand for."""

    def __init__(self, text: bytes | str) -> None:
        super().__init__(text)
        self.depth = 0
        self.sizes: dict[Node, tuple[int, int]] = {}

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Refuse what is too deep or too much while it is read, before anything is made of it."""
        self.depth += 1
        if len(self.sizes) > MAX_ENTRIES:
            raise ValueError(f"it has more than {MAX_ENTRIES:,} entries")
        if self.depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None and not is_alias:
            self.sizes[node] = self._size(node)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Refuse names that are no text, and names that are there twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, _name_of(key)
            if name in lines and key.tag != f"{TAG}merge":
                raise ValueError(f"{name:.80} is there twice, lines {lines[name]} and {line}")
            lines[name] = line
        return node

    def _size(self, node: Node) -> tuple[int, int]:
        """Entries and characters that a node stands for, and its depth, with all of its aliases spelt out."""
        if isinstance(node, ScalarNode):
            if SURROGATE.search(node.value):
                raise ValueError(
                    f"line {node.start_mark.line + 1} has half of a surrogate pair; write the character itself"
                )
            return 1 + len(node.value), 0
        inner = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        if any(part not in self.sizes for part in inner):
            raise ValueError(f"line {node.start_mark.line + 1} refers to itself")
        weights, depths = zip(*(self.sizes[part] for part in inner), strict=True) if inner else ((), ())
        weight, depth = 1 + sum(weights), 1 + max(depths, default=0)
        if weight > MAX_WEIGHT or depth > MAX_DEPTH:
            raise ValueError(f"line {node.start_mark.line + 1} stands for too much with all its aliases (*name)")
        return weight, depth


class Dumper(yaml.SafeDumper):
    """Quotes text that any reader, of YAML 1.1 or 1.2, would take for something else."""

    def represent_str(self, text: str) -> ScalarNode:
        """Line ends other than a line feed would be read as one, unless they are escaped, as in double quotes."""
        return self.represent_scalar(f"{TAG}str", text, '"' if LINE_ENDS.search(text) else None)


def parse_yaml(content: bytes | str) -> Any:
    """The value in YAML; every entry is its own, also where aliases stand for one. Raises ValueError with a reason."""
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 1024**2} MiB")
    try:
        loader = Loader(content)
        return _own(loader.get_single_data())
    except yaml.reader.ReaderError as error:
        raise ValueError(_unreadable(error)) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context:.200}") from None
    except (yaml.YAMLError, OverflowError, RecursionError) as error:
        raise ValueError(f"{error!s:.200}") from None


def plain_number(text: str) -> int | float | None:
    """The number that text is in YAML, if it is one."""
    if PLAIN["int"][0].fullmatch(text) and len(text) <= MAX_DIGITS:
        return int(text)
    return _float(text) if PLAIN["float"][0].fullmatch(text) else None


def to_yaml_text(values: Any) -> str:
    """YAML that `parse_yaml` reads as the same values."""
    text: str = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    return text


def _own(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _own(item) for name, item in value.items()}
    return [_own(item) for item in value] if isinstance(value, list) else value


def _name_of(key: Node) -> str:
    if key.tag not in (f"{TAG}str", f"{TAG}merge") or not isinstance(key, ScalarNode):
        shown = key.value if isinstance(key, ScalarNode) else "a list or section"
        raise ValueError(
            f"the name in line {key.start_mark.line + 1} must be text, but is {shown:.60}; put it in quotes"
        )
    return str(key.value)


def _unreadable(error: yaml.reader.ReaderError) -> str:
    kind = f"character U+{error.character:04X}" if error.encoding == "unicode" else "a byte that is no text"
    return f"it has {kind} at position {error.position}, which YAML does not allow; save it as plain UTF-8 text"


def _plain(kind: Callable[[str], Any]) -> Callable[[Loader, Node], Any]:
    def construct(loader: Loader, node: Node) -> Any:
        text = str(loader.construct_scalar(node))  # type: ignore[arg-type]
        name = node.tag.removeprefix(TAG)
        if not PLAIN[name][0].fullmatch(text):
            raise ValueError(f"line {node.start_mark.line + 1}: {text!r:.60} is not what its tag !!{name} says")
        if name == "int" and len(text) > MAX_DIGITS:
            raise ValueError(f"line {node.start_mark.line + 1} has a number of {len(text)} digits")
        return kind(text)

    return construct


def _float(text: str) -> float:
    return float(text.replace(".", "") if text[-1].isalpha() else text)


def _refuse(_loader: Loader, node: Node) -> Any:
    raise ValueError(f"line {node.start_mark.line + 1} has the tag {node.tag.replace(TAG, '!!'):.60}, which has no use")


Dumper.add_representer(str, Dumper.represent_str)
Loader.yaml_implicit_resolvers = {}  # without those of YAML 1.1
for _name, (_pattern, _first) in PLAIN.items():
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    Loader.add_implicit_resolver(TAG + _name, _whole, _first)
    Dumper.add_implicit_resolver(TAG + _name, _whole, _first)
Loader.yaml_constructors = {
    f"{TAG}null": _plain(lambda _: None),
    f"{TAG}bool": _plain(lambda text: text.lower() == "true"),
    f"{TAG}int": _plain(int),
    f"{TAG}float": _plain(_float),
    f"{TAG}merge": Loader.construct_yaml_str,
    f"{TAG}str": Loader.construct_yaml_str,
    f"{TAG}seq": Loader.construct_yaml_seq,
    f"{TAG}map": Loader.construct_yaml_map,
    None: _refuse,
}
