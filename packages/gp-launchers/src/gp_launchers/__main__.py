"""Start of the launcher: the kernel first, everything that is slow to import afterwards.

A kernel needs some hundred milliseconds to import itself; `ssl`, `socket` and `json` are imported meanwhile. That is
why this module and those that it imports at its head use `os`, `sys` and small C modules only.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` imports `enum`: 5 ms
import gc
import os
import sys

from .errors import StartError
from .launch import Launch
from .log import Log
from .options import HELP, UsageError, parse
from .secrets_input import SecretsError, read_secrets

HELD = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGUSR1, _signal.SIGUSR2, _signal.SIGQUIT)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .attached import Attached
    from .kernel import Kernel
    from .process import Child


def main(argv: list[str] | None = None) -> int:
    """Run one launcher until its kernel is done with.

    Args:
        argv: Command line without the program; default: that of the process.

    Returns:
        Exit code: the kernel's (128+n for a signal), 2 for bad options, 75 if no server took it, 77 if a server
        refused it for good, 78 if this Python has no TLS 1.3.
    """
    gc.disable()  # importing makes many objects and hardly any garbage: 3 ms
    _fill_standard_streams()
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        if options.show:
            sys.stdout.write(_shown(options.show))
            return 0
        secrets = read_secrets(options.secrets_file)
    except (UsageError, SecretsError) as error:
        sys.stderr.write(f"gp-launcher: {error}\n")
        return 2
    # Nobody handles them yet, and what they do by default would leave the kernel's files: the supervisor lets them in.
    _signal.pthread_sigmask(_signal.SIG_BLOCK, HELD)
    log = Log(options.log_file, options.kernel_id)
    launch = Launch(options, secrets, log)
    kernel: Kernel | Attached | None = None
    try:
        outcome: Child | StartError | None = None
        if not options.attach:
            try:
                outcome = launch.start()
            except StartError as error:
                outcome = error
        from .supervisor import Supervisor, watch

        gc.enable()
        kernel = watch(launch, outcome)
        return Supervisor(options, secrets.token, kernel, log).run()
    except Exception:
        import traceback

        log("%s", traceback.format_exc())
        return 70
    finally:
        if kernel is not None:
            kernel.destroy()
        else:
            launch.remove_files()


def _shown(what: str) -> str:
    if what == "help":
        return HELP
    if what == "version":
        from . import __version__

        return f"gp-launcher {__version__}\n"
    import json

    from .survey import found

    return json.dumps(found()) + "\n"


def _fill_standard_streams() -> None:
    # A daemon may start us with 0, 1 or 2 closed: a file of ours would get that number and later be taken for it.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


if __name__ == "__main__":
    sys.exit(main())
