"""Settings of Sphinx, which makes a site of these pages: `make docs`."""

project = "mlflow-hokusai-auth"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "mlflow-hokusai-auth"
html_copy_source = False
# So that a page may link to a heading of another one, by GitHub's names.
myst_heading_anchors = 4
# Pages also show languages that Pygments has no lexer for.
suppress_warnings = ["misc.highlighting_failure"]
