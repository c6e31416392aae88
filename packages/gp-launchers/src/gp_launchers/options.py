"""The command line, parsed by hand: argparse costs 10 ms of every kernel's start."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

HELP = """\
usage: gp-launcher --kernel-id ID --response-address HOST:PORT[,...] --public-key PIN[,PIN] [options] [-- KERNEL ARGV]

Starts a Jupyter kernel here, watches it and keeps one TLS session to the server that asked for it.
Its token and the kernel's connection come as JSON in the environment variable GP_LAUNCH_SECRETS or from --secrets-file.

  --kernel-id ID            id of the kernel
  --response-address LIST   addresses of the server: host:port, IPv6 in brackets, several with commas
  --public-key LIST         SHA-256 of the server's certificate (hex), one or two with a comma
  --port-range LOW..HIGH    ports of the kernel; 0..0 (default): any
  --secrets-file PATH       instead of GP_LAUNCH_SECRETS; `-` is standard input; a file is deleted once read
  --cwd DIR                 folder of the kernel, if it exists here, else the home folder
  --orphan-timeout S        seconds without a server until all ends (default 600; the server may change it)
  --runtime-dir DIR         for the connection file (default: $GP_RUNTIME_DIR, $XDG_RUNTIME_DIR/gp, $TMPDIR/gp-UID)
  --log-file PATH           instead of standard error
  --spark-context-initialization-mode none|lazy|eager   define spark and sc in a Python kernel
  --kernel-class-name NAME  class of an ipykernel
  --transport-encryption X  accepted and offered as a placeholder
  --attach PID              watch a kernel that runs in process PID instead of starting one; needs --connection-file
  --connection-file PATH    with --attach: where to write it
  --survey                  print the kernels that could be started here, as JSON
  --version, --help

The kernel's argv may hold {connection_file}, {kernel_id}, {port_range}, {response_address}, {public_key} and
{transport_encryption}. Default: this Python with -m ipykernel_launcher -f {connection_file}.
"""


class UsageError(Exception):
    """The command line is wrong; the text is one line for people."""


class Options:
    """What the command line says; attributes are named as the options are."""

    def __init__(self) -> None:
        self.show = ""  # "help", "version" or "survey"
        self.kernel_id = ""
        self.response_address: list[tuple[str, int]] = []
        self.public_key: list[str] = []
        self.port_range = (0, 0)
        self.secrets_file = ""
        self.cwd = ""
        self.orphan_timeout = 600.0
        self.runtime_dir = ""
        self.log_file = ""
        self.spark_context_initialization_mode = "none"
        self.kernel_class_name = ""
        self.transport_encryption = ""
        self.attach = 0
        self.connection_file = ""
        self.argv: list[str] = []
        self.given: dict[str, str] = {}  # as written, for placeholders


def parse(argv: list[str]) -> Options:
    """Return the options of a command line.

    Args:
        argv: Words after the program's name; those after `--` are the kernel's argv.

    Raises:
        UsageError: Something is unknown, missing or malformed.
    """
    options = Options()
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if word == "--":
            options.argv = argv[position:]
            if not options.argv:
                raise UsageError("there is no kernel argv after `--`")
            break
        if word in ("-h", "--help", "--version", "--survey"):
            options.show = {"--version": "version", "--survey": "survey"}.get(word, "help")
            return options
        name, equals, value = word.partition("=")
        option = name[2:].replace("_", "-") if name.startswith("--") else ""
        if option not in _READERS:
            raise UsageError(f"unknown option {name!r}; see --help")
        if not equals:
            if position == len(argv):
                raise UsageError(f"--{option} needs a value")
            value = argv[position]
            position += 1
        attribute = option.replace("-", "_")
        options.given[attribute] = value
        if value:  # kernelspecs pass on variables that may be empty: the default holds
            try:
                setattr(options, attribute, _READERS[option](value))
            except ValueError as error:
                raise UsageError(f"--{option}: {error}") from None
    _check(options)
    return options


def _check(options: Options) -> None:
    if not options.kernel_id.isprintable():
        raise UsageError("--kernel-id: it holds characters that cannot be printed")
    for option in ("kernel-id", "response-address", "public-key"):
        if not getattr(options, option.replace("-", "_")):
            raise UsageError(f"--{option} is missing; see --help")
    if bool(options.attach) != bool(options.connection_file):
        raise UsageError("--attach and --connection-file belong together")
    if options.attach and options.argv:
        raise UsageError("--attach starts no kernel: it takes no kernel argv")


def port_range(text: str) -> tuple[int, int]:
    """Return ``(low, high)`` of `LOW..HIGH`; ``(0, 0)`` is any port.

    Raises:
        ValueError: Not two numbers from 1 to 65535 in order, nor `0..0`.
    """
    low_text, dots, high_text = text.strip().partition("..")
    if not (dots and low_text.isascii() and low_text.isdigit() and high_text.isascii() and high_text.isdigit()):
        raise ValueError(f"{text!r} is not a port range such as 40000..41000")
    low, high = int(low_text), int(high_text)
    if (low, high) != (0, 0) and not 1 <= low <= high <= 65535:
        raise ValueError(f"{text!r} is not a range inside 1..65535")
    return low, high


def addresses(text: str) -> list[tuple[str, int]]:
    """Return ``[(host, port), ...]`` of a list such as `gw1:8877,[fd00::1]:8877`.

    Raises:
        ValueError: A part has no host or no port.
    """
    found = []
    for part in text.split(","):
        host, colon, port = part.strip().rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f"{part!r}: an IPv6 address needs brackets, as in [fd00::1]:8877")
        if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError(f"{part!r} is not host:port")
        found.append((host, int(port)))
    return found


def _pins(text: str) -> list[str]:
    pins = [pin.strip().lower() for pin in text.split(",") if pin.strip()]
    for pin in pins:
        if len(pin) != 64 or pin.strip("0123456789abcdef"):
            raise ValueError(f"a pin is the SHA-256 of the server's certificate: 64 hexadecimal digits, not {len(pin)}")
    return pins


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise ValueError(f"{text!r} is not a number of seconds")
    return seconds


def _pid(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 1):
        raise ValueError(f"{text!r} is not a process id")
    return int(text)


def _mode(text: str) -> str:
    if text not in ("none", "lazy", "eager"):
        raise ValueError(f"{text!r} is not one of none, lazy, eager")
    return text


_READERS: dict[str, Callable[[str], object]] = {
    "kernel-id": str,
    "response-address": addresses,
    "public-key": _pins,
    "port-range": port_range,
    "secrets-file": str,
    "cwd": str,
    "orphan-timeout": _seconds,
    "runtime-dir": str,
    "log-file": str,
    "spark-context-initialization-mode": _mode,
    "kernel-class-name": str,
    "transport-encryption": str,
    "attach": _pid,
    "connection-file": str,
}
