"""One start of the kernel: folder, ports, connection file, argv, environment, process.

It comes before anything slow is imported, so what only matters later is elsewhere (`kernel`, `probe`, `cleanup`).
"""

from __future__ import annotations

import os

from . import files, process
from .command import kernel_argv, kernel_environment, kernel_folder
from .errors import StartError
from .ports import Ports
from .quickjson import dump_flat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .log import Log
    from .options import Options
    from .secrets_input import Secrets


class Launch:
    """What every start of one kernel has in common, and how to start it.

    Args:
        options: The command line.
        secrets: Template of the connection and additions to the environment.
        log: For remarks.

    Attributes:
        argv: Kernel's argv with placeholders; a restart may change it, and `env` and `cwd`.
        ports: Its ports once they are chosen; they stay the same as long as a client may know them.
    """

    def __init__(self, options: Options, secrets: Secrets, log: Log) -> None:
        self.options = options
        self.log = log
        self.argv = options.argv
        self.env = secrets.env
        self.cwd = options.cwd
        self.ports: Ports | None = None
        self._connection = secrets.connection
        self._folder: files.KernelFolder | None = None

    def start(self, hold: bool = True) -> process.Child:
        """Start the kernel.

        Args:
            hold: Keep the ports from others until the kernel has them.

        Raises:
            StartError: It cannot be started.
        """
        folder = self.private_folder()
        if self.ports is not None:
            self.ports.hold()
        path = os.path.join(folder, "connection.json")
        ports = self.write_connection_file(path)  # before every start: ipykernel deletes it when it ends
        if not hold:
            ports.release()
        argv = kernel_argv(self.argv, self.options, path)
        if self.options.spark_context_initialization_mode != "none" or self.options.kernel_class_name:
            from .spark import adapt

            argv = adapt(argv, self.options, folder, self.log)
        env = kernel_environment(os.environ, self.env, self.options.kernel_id)
        try:
            return process.start(argv, env, kernel_folder(self.cwd, env, self.log))
        except OSError as error:
            raise StartError("CommandNotFound", f"cannot start a process: {error.strerror}") from None

    def private_folder(self) -> str:
        """Return the path of the folder that only this user can enter; made by the first start.

        Raises:
            StartError: NoSpace or NoConnectionFile.
        """
        if self._folder is None:
            self._folder = files.create_folder(self.options.runtime_dir, self.options.kernel_id, os.environ)
        return self._folder.path

    def write_connection_file(self, path: str) -> Ports:
        """Choose the ports, unless that is done, and write the connection file.

        Raises:
            StartError: NoPort, NoSpace or NoConnectionFile.
        """
        if self._connection is None:
            raise StartError("NoConnectionFile", "the launch secrets have no connection")
        if self.ports is None:
            self.ports = Ports(self._connection, self.options.port_range, os.path.dirname(path))
        files.write_private(path, dump_flat({**self._connection, **self.ports.chosen()}))
        return self.ports

    def remove_files(self) -> None:
        """Delete what was written, and let go of the ports."""
        if self.ports is not None:
            self.ports.release()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None
