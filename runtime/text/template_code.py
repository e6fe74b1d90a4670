"""The Python code that Jinja2 makes of a chat template, with calls that count what the sandbox cannot see."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.ext import Extension
from jinja2.parser import Parser

from .budget import shallow_size

__all__ = ["GenerationTag", "MeteredCode"]


class GenerationTag(Extension):
    """`{% generation %}`, which marks the assistant's words for training, is a block that only writes its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    @staticmethod
    def _content(caller: Callable[[], str]) -> str:
        return caller()


class MeteredCode(CodeGenerator):
    """Makes templates pay for what the sandbox cannot see: loops, macros, `~`, comparisons and slices."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802 - Jinja2's name
        node.body.insert(0, nodes.ExprStmt(_turn(node.body)))
        if node.test is not None:
            node.test = nodes.And(_turn([]), node.test)
        super().visit_For(node, frame)

    def visit_Macro(self, node: nodes.Macro, frame: Frame) -> None:  # noqa: N802
        node.body.insert(0, nodes.ExprStmt(_turn(node.body)))
        super().visit_Macro(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        join = "markup_join" if frame.eval_ctx.autoescape else "str_join"
        if frame.eval_ctx.volatile:
            join = "(markup_join if context.eval_ctx.volatile else str_join)"
        self.write(f"{join}(environment.shown((")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write(")))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        self.write("(environment.read(")
        self.visit(node.expr, frame)
        for operand in node.ops:
            self.write(f") {operators[operand.op]} environment.read(")
            self.visit(operand.expr, frame)
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.copied(")
        self.visit(node.node, frame)
        self.write(")[")
        self.visit(node.arg, frame)
        self.write("]")


def _turn(body: list[nodes.Node]) -> nodes.Expr:
    """A call of `environment.turn` with the bytes of the template's own text in a body."""
    texts = [data.data for node in body for data in node.find_all(nodes.TemplateData)]
    texts += [const.value for node in body for const in node.find_all(nodes.Const) if isinstance(const.value, str)]
    size = nodes.Const(sum(map(shallow_size, texts)))
    return nodes.Call(nodes.EnvironmentAttribute("turn"), [size], [], None, None)
