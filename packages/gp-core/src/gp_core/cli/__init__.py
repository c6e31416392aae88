"""``jupyter gp``: what is installed, what is wrong, kernelspecs, and the kernels of this installation."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

from jupyter_core.application import JupyterApp, NoStart
from traitlets import TraitError
from traitlets.config import ConfigurableError

from .. import __version__
from ..errors import GPError

HELP = """\
Usage: jupyter gp COMMAND [ARGUMENTS]

Start Jupyter kernels somewhere else, and have them feel local.

See what is there
  list        the installed backends and the provisioners that use them
  doctor      what is wrong with this installation or with one kernelspec
  demo        a kernel through the whole protocol, beside a plain local one
Kernelspecs
  install     make a kernelspec whose kernels a backend starts
  params      what a user may choose when a kernel of a kernelspec starts
Kernels of this installation
  ps          all of them, with state and owner
  logs        the last lines that a kernel wrote
  stop        end a kernel and its job
  gc          remove what servers that are gone have left

jupyter gp COMMAND --help shows the arguments of a command, --help-all every
option that configuration files and the environment may set; --version.
"""


class JupyterGP(JupyterApp):
    """The application ``jupyter gp``; every subcommand is one of its own, imported when it is used."""

    name = "jupyter-gp"
    description = "Start Jupyter kernels somewhere else"
    version = __version__
    subcommands = {  # noqa: RUF012  traitlets' own form
        "list": ("gp_core.cli.backends.List", "the installed backends"),
        "doctor": ("gp_core.cli.doctor.Doctor", "what is wrong"),
        "demo": ("gp_core.cli.demo.Demo", "a kernel through the whole protocol"),
        "install": ("gp_core.cli.kernelspecs.Install", "make a kernelspec"),
        "params": ("gp_core.cli.kernelspecs.Params", "what a user may choose"),
        "ps": ("gp_core.cli.look.Ps", "kernels of this installation"),
        "logs": ("gp_core.cli.look.Logs", "the last lines that a kernel wrote"),
        "stop": ("gp_core.cli.stop.Stop", "end a kernel and its job"),
        "gc": ("gp_core.cli.stop.Gc", "remove what servers that are gone have left"),
    }

    def parse_command_line(self, argv: list[str] | None = None) -> None:
        """Choose the subcommand; anything else is answered here."""
        first = argv[0] if argv else ""
        if first in self.subcommands:
            super().parse_command_line(argv)
            return
        if first == "--version":
            sys.stdout.write(f"{__version__}\n")
        elif first == "--help-all":
            from .command import HOW_TO_SET, all_options

            sys.stdout.write(f"{HELP}\n{HOW_TO_SET}\n{all_options()}")
        elif first in ("-h", "--help", "help"):
            sys.stdout.write(HELP)
        elif not first:
            sys.stderr.write(HELP)
        else:
            near = difflib.get_close_matches(first, self.subcommands, 1)
            hint = f"did you mean {near[0]}?" if near else "see jupyter gp --help"
            sys.stderr.write(f"jupyter gp: there is no command {first!r}; {hint}\n")
        raise SystemExit(0 if first in ("--version", "--help-all", "-h", "--help", "help") else 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``jupyter gp``.

    Args:
        argv: Without the program's name; default: that of this process.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong arguments.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    app = JupyterGP()
    try:
        app.initialize(given)
        app.start()
    except NoStart:
        sys.stdout.flush()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except GPError as error:
        return _failed(given, str(error))
    except (TraitError, ConfigurableError) as error:
        return _failed(given, f"configuration: {error}")
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    finally:
        if app.subapp is not None:
            type(app.subapp).clear_instance()
    return getattr(app.subapp, "code", 0)


def _failed(argv: Sequence[str], text: str) -> int:
    sys.stderr.write(f"jupyter gp{f' {argv[0]}' if argv else ''}: {text}\n")
    return 1
