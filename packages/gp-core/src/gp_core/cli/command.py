"""What all subcommands share: arguments, configuration files, and one way to answer."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Coroutine
from typing import Any, ClassVar, NoReturn, TypeVar

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.application import JupyterApp
from traitlets import HasTraits, default

T = TypeVar("T")
CONFIGURATION = re.compile(r"--[A-Z]\w*\.\w+=.*", re.DOTALL)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: {message}; see {self.prog} --help\n")
        raise SystemExit(2)


class _Note(logging.Formatter):
    """One line, whatever a platform's client has written."""

    def format(self, record: logging.LogRecord) -> str:
        return f"note: {record.getMessage().strip().splitlines()[0]}"


class Command(JupyterApp):
    """One subcommand.

    traitlets would show a hundred options for each; so the few arguments of a command are argparse's, and options of gp
    itself may follow as ``--Class.option=value``, as in every Jupyter application.
    """

    verb: ClassVar[str]  #: after "jupyter gp"
    summary: ClassVar[str]  #: one line
    usage: ClassVar[str | None] = None  #: of a command with many arguments
    details: ClassVar[str] = ""  #: the rest of the help
    prints_data: ClassVar[bool] = True  #: has --json
    tells_problems: ClassVar[bool] = False  #: of plugins itself, so that no warning has to

    code = 0  #: exit code

    @default("log_level")
    def _few_words(self) -> int:
        return logging.WARNING

    @default("config_file_name")
    def _one_file_for_all(self) -> str:
        return "jupyter_gp_config"

    def arguments(self, group: argparse._ArgumentGroup) -> None:
        """Declare the command's own arguments."""

    def run(self) -> int:
        """Do it; returns the exit code."""
        raise NotImplementedError

    # -- called by traitlets

    def parse_command_line(self, argv: list[str] | None = None) -> None:
        """Read the arguments; options of classes go on to traitlets."""
        parser = self._parser()
        group = parser.add_argument_group("arguments")  # one for all: the help has to fit a screen
        self.arguments(group)
        if self.prints_data:
            group.add_argument("--json", action="store_true", help="print data for programs")
        group.add_argument("--config", metavar="FILE", help=argparse.SUPPRESS)
        group.add_argument("--help-all", action="store_true", help="show every option of gp, and how to set it")
        if "--help-all" in (argv or ()):  # before required arguments are missed
            self._show_all(parser)
            raise SystemExit(0)
        self.args, rest = parser.parse_known_args(argv)
        for part in rest:
            if not CONFIGURATION.fullmatch(part):
                parser.error(f"unknown argument {part}")
        if self.args.config:
            if not os.path.isfile(self.args.config):  # traitlets would go on without it
                parser.error(f"--config {self.args.config}: there is no such file")
            self.config_file = self.args.config
        super().parse_command_line(rest)

    def migrate_config(self) -> None:
        """Leave the user's configuration folder alone."""

    def _find_subcommand(self, name: str) -> str:
        return ""  # arguments are not the names of further commands

    def start(self) -> None:
        notes = logging.StreamHandler(sys.stderr)
        notes.setFormatter(_Note())
        logger, loading = logging.getLogger("gp_core"), logging.getLogger("gp_core.plugins")
        logger.addHandler(notes)
        loading.setLevel(logging.ERROR if self.tells_problems else logging.NOTSET)
        try:
            self.code = self.run()
        finally:
            logger.removeHandler(notes)
            loading.setLevel(logging.NOTSET)

    # -- for the commands

    @property
    def specs(self) -> KernelSpecManager:
        """The kernelspecs of this installation."""
        return KernelSpecManager(parent=self)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the runtime's loop, where backends live, and return its result."""
        from ..runtime import runtime

        return runtime().submit(work).result()

    def print_json(self, data: Any) -> None:
        sys.stdout.write(json.dumps(data, indent=2) + "\n")

    # -- help

    def _parser(self) -> argparse.ArgumentParser:
        parser = _Parser(
            prog=f"jupyter gp {self.verb}",
            usage=f"%(prog)s {self.usage}" if self.usage else None,
            description=self.summary,
            epilog=self.details,
            add_help=False,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=79),
        )
        parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        return parser

    def _show_all(self, parser: argparse.ArgumentParser) -> None:
        sys.stdout.write(f"{parser.format_help()}\n{HOW_TO_SET}\n{all_options()}")


HOW_TO_SET = """\
Options of gp are set in jupyter_gp_config.py or the file of --config FILE, on the
command line as --Class.option=value, or by the environment where a variable is named.
The server that starts kernels reads its own files, such as jupyter_server_config.py.
"""


def all_options() -> str:
    """Return the help of every option that configuration files, ``--Class.option=value`` or the environment may set."""
    from ..options import ProvisionerOptions
    from ..plugins import plugins
    from ..server import KernelServer

    classes: list[type[HasTraits]] = [KernelServer, ProvisionerOptions, *plugins().backends.values()]
    parts = []
    for cls in classes:
        own = sorted(cls.class_own_traits(config=True).items())
        if not own:
            continue
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        lines = [f"{cls.__name__}: {summary}", ""]
        for name, trait in own:
            variable = f"  [{trait.metadata['env']}]" if "env" in trait.metadata else ""
            lines += [f"  --{cls.__name__}.{name}=<{type(trait).__name__}>{variable}", f"      {trait.help}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
