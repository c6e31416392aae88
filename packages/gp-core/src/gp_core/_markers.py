"""The two pluggy markers, importable without anything else of the package."""

import pluggy

PROJECT = "gp_core"
"""Name of the pluggy project and of the entry-point group of plugins."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
