"""How Sphinx builds these pages: Markdown by MyST, the API from docstrings in Google's form, furo for the looks."""

import re

import fbn_plugin

project = "fbn_plugin"
author = "the fbn_plugin contributors"
release = version = fbn_plugin.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3

# Names of other packages in docstrings stay plain text: nothing is looked up on the network.
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_show_copyright = False
html_title = f"fbn_plugin {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


def tidy_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """What napoleon and docutils read otherwise than a person does: a sentence in "Raises" that goes on in the next
    line is one exception, not two, and "C." is no first item of a list."""
    section = ""
    for i, line in enumerate(lines):
        if re.fullmatch(r"[A-Z]\w+:", line):
            section = line
        elif line and not line.startswith(" "):
            section = ""
        elif section in ("Raises:", "Warns:") and line and not re.match(r"    (\w+, )*\w+(Error|Warning): ", line):
            lines[i] = "    " + line
        lines[i] = re.sub(r"^(    \w+): C\.", r"\1: ``C``.", lines[i])


def setup(app) -> None:
    app.connect("autodoc-process-docstring", tidy_docstring, priority=400)  # before napoleon's 500
