"""Sphinx's settings: `make docs` makes a site of these pages."""

project = "mlflow-hokusai-auth"
extensions = ["myst_parser"]
# The requirements are for the team, and stay in the repository only.
exclude_patterns = ["_build", "requirements.md"]
html_theme = "furo"
html_title = "mlflow-hokusai-auth"
html_copy_source = False
# Pages link to headings of other pages by GitHub's anchors.
myst_heading_anchors = 4
# Pages show code in languages for which Pygments has no lexer.
suppress_warnings = ["misc.highlighting_failure"]
