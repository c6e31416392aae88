"""Sphinx configuration; `nox -s docs` builds it, and a warning is an error."""

import sys
from pathlib import Path

import gp_core

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "gateway provisioners"
author = "gateway provisioners contributors"
copyright = "gateway provisioners contributors"
version = release = gp_core.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "gp_docs"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "gateway provisioners"
html_static_path = ["_static"]
html_css_files = ["gp.css"]
html_show_copyright = False

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

# Docstrings mark names by single backticks: they become links where the name is documented, and code elsewhere.
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "both"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
add_module_names = False
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

nitpicky = True
# Names of other projects cannot be linked without the network, and docstrings may name what has no page.
nitpick_ignore_regex = [
    ("py:obj", r".*"),
    ("py:(class|exc|func|meth|data|mod)", r"(?!gp_).*"),
    ("py:class", r"gp_core\.kernel\.(RemoteKernel|Plan)|gp_core\.\w+\.[PT]"),
]
