"""Find the external variables of a Jinja template: those that it reads without having set them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from jinja2 import nodes

_RAISES = "raise_exception"  # a function of chat templates: nothing after it is rendered


@dataclass
class _Path:
    """Names that are definitely set at a point of the template.

    Attributes:
        ended: the point is unreachable, as after `raise_exception`, `break` and `continue`.
    """

    names: set[str] = field(default_factory=set)
    ended: bool = False

    def copy(self) -> _Path:
        return _Path(set(self.names), self.ended)


def outer_reads(template: nodes.Template) -> set[str]:
    """Return the names that are read on some path through the template before they are assigned.

    `jinja2.meta.find_undeclared_variables` also reports names that are set in every branch or in loops. As in
    Jinja, an `if` shares the scope around it; names set in a loop, a macro, a call block or `with` are local.
    """
    reads = _Reads({macro.name for macro in template.find_all(nodes.Macro)})
    reads.body(template.body, _Path())
    return reads.found


class _Reads:
    def __init__(self, macros: set[str]) -> None:
        self.found: set[str] = set()
        self.macros = macros  # a macro may call one that is defined after it

    def body(self, statements: Iterable[nodes.Node], path: _Path) -> None:
        for statement in statements:
            self.statement(statement, path)

    def scope(self, statements: Iterable[nodes.Node], path: _Path, *own: str) -> None:
        """Visit statements in a new scope with the names `own`."""
        inner = path.copy()
        inner.names |= {*own}
        self.body(statements, inner)

    def statement(self, node: nodes.Node, path: _Path) -> None:
        if path.ended:
            return
        if isinstance(node, nodes.If):
            self._if(node, path)
        elif isinstance(node, nodes.For):
            self._for(node, path)
        elif isinstance(node, nodes.Macro | nodes.CallBlock):
            self._macro(node, path)
        elif isinstance(node, nodes.With):
            for value in node.values:
                self.expression(value, path)
            self.scope(node.body, path, *(name for each in node.targets for name in _set_by(each)))
        elif isinstance(node, nodes.Assign):
            self.expression(node.node, path)
            self._assign(node.target, path)
        elif isinstance(node, nodes.AssignBlock):
            self.scope(node.body, path)
            if node.filter is not None:
                self.expression(node.filter, path)
            self._assign(node.target, path)
        elif isinstance(node, nodes.Break | nodes.Continue):
            path.ended = True
        elif isinstance(node, nodes.FilterBlock):
            self.scope(node.body, path)
            self.expression(node.filter, path)
        elif isinstance(node, nodes.Scope | nodes.Block):
            self.scope(node.body, path)
        else:
            self.expression(node, path)
            path.ended = any(_raises(call) for call in node.find_all(nodes.Call))

    def expression(self, node: nodes.Node, path: _Path) -> None:
        """Add the names that an expression reads."""
        names = [node] if isinstance(node, nodes.Name) else node.find_all(nodes.Name)
        self.found |= {each.name for each in names if each.ctx == "load"} - path.names

    def _assign(self, target: nodes.Node, path: _Path) -> None:
        references = [target] if isinstance(target, nodes.NSRef) else target.find_all(nodes.NSRef)
        self.found |= {each.name for each in references} - path.names
        path.names |= _set_by(target)

    def _if(self, node: nodes.If, path: _Path) -> None:
        ways: list[_Path] = []
        for branch in (node, *node.elif_):
            self.expression(branch.test, path)
            ways.append(path.copy())
            self.body(branch.body, ways[-1])
        ways.append(path.copy())
        self.body(node.else_, ways[-1])
        open_ways = [way.names for way in ways if not way.ended]
        path.ended = not open_ways
        if open_ways:
            path.names |= set.intersection(*open_ways)

    def _for(self, node: nodes.For, path: _Path) -> None:
        self.expression(node.iter, path)
        own = {*_set_by(node.target), "loop"}
        if node.test is not None:
            self.expression(node.test, _Path(path.names | own))
        self.scope(node.body, path, *own)
        self.scope(node.else_, path)

    def _macro(self, node: nodes.Macro | nodes.CallBlock, path: _Path) -> None:
        if isinstance(node, nodes.Macro):
            path.names.add(node.name)
        else:
            self.expression(node.call, path)
        own = {argument.name for argument in node.args}
        for value in node.defaults:
            self.expression(value, _Path(path.names | own))
        self.scope(node.body, path, *own, *self.macros, "caller", "varargs", "kwargs")


def _set_by(target: nodes.Node) -> set[str]:
    names = [target] if isinstance(target, nodes.Name) else target.find_all(nodes.Name)
    return {each.name for each in names}


def _raises(call: nodes.Call) -> bool:
    return isinstance(call.node, nodes.Name) and call.node.name == _RAISES
