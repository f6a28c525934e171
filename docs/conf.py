"""Sphinx's settings: `make docs` makes a site of these pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent.parent / "mlflow_hokusai_auth"

project = "mlflow-hokusai-auth"
release = re.search(r'^__version__ = "(.+)"$', (_PACKAGE / "__init__.py").read_text(), re.M)[1]  # type: ignore[index]
extensions = ["myst_parser"]
# The requirements are for the team, and stay in the repository only.
exclude_patterns = ["_build", "requirements.md"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = "mlflow-hokusai-auth"
html_favicon = html_logo = "../mlflow_hokusai_auth/server/web/static/hokusai.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
# Pages link to headings of other pages by GitHub's anchors.
myst_heading_anchors = 4
# Pages show code in languages for which Pygments has no lexer.
suppress_warnings = ["misc.highlighting_failure"]

#: Where long names stand: headings, and words of code that may not fit into a line.
_NAMED = re.compile(r'<h\d\b.*?</h\d>|<span class="pre">[^<]{25,}</span>', re.DOTALL)
#: A tag, or a place in a text at which a name may break: after a part of it.
_PART = re.compile(r"(<[^>]*>)|(?<=\w)([_/])(?=[\w{])")


def _break(html: str) -> str:
    return _PART.sub(lambda found: found[1] or f"{found[2]}<wbr>", html)


def _let_names_break(
    _app: Any, _name: str, _template: str, context: dict[str, Any], _doctree: object
) -> None:
    """Let long names break after each of their parts, and so nowhere else."""
    if "body" in context:
        context["body"] = _NAMED.sub(lambda found: _break(found[0]), context["body"])
        context["toc"] = _break(context["toc"])


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("html-page-context", _let_names_break)
