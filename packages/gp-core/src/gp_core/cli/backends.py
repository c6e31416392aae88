"""``jupyter gp list``."""

from __future__ import annotations

from typing import Any

from .command import Command
from .tables import say, show


class List(Command):
    """Shows backends, and the plugins that are not used."""

    name = "jupyter-gp-list"
    verb = "list"
    summary = "List the installed backends, and the provisioners of kernel.json that use them."
    tells_problems = True

    def run(self) -> int:
        found = installed()
        if self.args.json:
            self.print_json(found)
            return 0
        rows = [(b["name"], b["package"], b["version"], ", ".join(b["provisioners"])) for b in found["backends"]]
        show(("BACKEND", "PACKAGE", "VERSION", "PROVISIONERS"), rows)
        for problem in found["problems"]:
            say(f"\nplugin {problem['plugin']} is not used: {problem['reason']}")
        return 0


def installed() -> dict[str, Any]:
    """Return every backend with its package and provisioners, and the plugins that are not used with the reason."""
    from ..install import offers
    from ..plugins import plugins

    known, backends = offers(), []
    for name in sorted(plugins().backends):
        package, _, version = plugins().owners[name].partition(" ")
        provisioners = [made.name for made in known.values() if made.backend.name == name]
        backends.append({"name": name, "package": package, "version": version, "provisioners": provisioners})
    problems = [{"plugin": problem.plugin, "reason": problem.reason} for problem in plugins().problems]
    return {"backends": backends, "problems": problems}
