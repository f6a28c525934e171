"""The site that `make docs` makes of the pages."""

from __future__ import annotations

from docs import conf

NAME = "HOKUSAI_AUTH_FORCE_MODE"


def test_long_names_break_after_their_parts_and_attributes_stay() -> None:
    broken = "HOKUSAI_<wbr>AUTH_<wbr>FORCE_<wbr>MODE"
    path = '<code><span class="pre">/api/2.0/mlflow/{run_id}/artifacts</span></code>'
    body = f'<h2 id="a_b">{NAME}<a href="#{NAME}">¶</a></h2><p>{NAME} {path} {"x" * 9}</p>'
    body += '<code><span class="pre">/etc/mlflow.env</span></code>'
    context = {"body": body, "toc": f'<li><a href="#a_b">{NAME}</a></li>'}
    conf._let_names_break(None, "", "", context, None)
    assert context["toc"] == f'<li><a href="#a_b">{broken}</a></li>'
    assert f'<h2 id="a_b">{broken}<a href="#{NAME}">¶</a></h2><p>{NAME} ' in context["body"]
    assert "/api/<wbr>2.0/<wbr>mlflow/<wbr>{run_<wbr>id}/artifacts" in context["body"]
    # A name that fits into any line stays whole.
    assert "/etc/mlflow.env" in context["body"]
    # Nothing but the places was added, so a name that is copied is the name.
    assert context["body"].replace("<wbr>", "") == body


def test_front_page_has_the_quick_start_of_the_readme() -> None:
    text = (conf._PACKAGE.parent / "docs" / "index.md").read_text()
    readme = (conf._PACKAGE.parent / "README.md").read_text()
    # Sphinx only warns of a mark that is not there, and then shows the whole page.
    for mark in ("# mlflow-hokusai-auth\n", "## How it works\n", "## Register a model\n"):
        assert readme.count(f"\n{mark}") + readme.startswith(mark) == 1, mark
    assert ':end-before: "## How it works"' in text
