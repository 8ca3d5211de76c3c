"""Chat templates as transformers renders them: jinja2 in a sandbox that cannot reach Python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from distill.commit import UserError


class GenerationBlock(Extension):
    """``{% generation %}…{% endgeneration %}`` marks answers for training: its content alone."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str) -> Any:
    """Raises: UserError naming the line that is not jinja2."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise UserError(
            f"the chat template is damaged ({_line(error)}); needs jinja2 source; "
            "export the student again, or give a plain prompt"
        ) from None


def render(template: Any, variables: Mapping[str, Any]) -> str:
    """Raises: UserError when the template refuses the messages or reaches out of its sandbox."""
    try:
        return str(template.render(**variables))
    except SecurityError as error:
        raise UserError(
            f"the chat template does what it may not ({_line(error)}); needs a template without "
            "access to Python; use another model or a plain prompt"
        ) from None
    except Exception as error:  # whatever a template's expressions raise on these messages
        raise UserError(
            f"the chat template refuses these messages ({_line(error)}); needs roles and contents "
            "that it knows; correct the messages"
        ) from None


def _raise_exception(message: str) -> Any:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
