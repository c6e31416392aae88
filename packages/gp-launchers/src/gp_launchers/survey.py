"""Find kernels that could be started here: kernelspecs, and conda and virtual environments.

`gp-launcher --survey` prints them; gp-ssh sends this file alone to a host.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterator

    Found = Dict[str, Any]

CONDA = (
    "~/miniforge3", "~/mambaforge", "~/miniconda3", "~/anaconda3", "~/micromamba", "~/.conda",
    "/opt/conda", "/opt/miniforge3", "/opt/miniconda3", "/opt/anaconda3",
)  # fmt: skip
OTHERS = (
    "~/.pyenv/versions/*", "~/.virtualenvs/*", "~/.venvs/*", "~/venvs/*", "~/envs/*", "~/.local/share/virtualenvs/*",
    "~/.venv", "~/*", "~/*/.venv", "~/*/venv", "~/*/env", "/opt/*", "/usr/local", "/usr",
)  # fmt: skip
SPECS = ("~/.local/share/jupyter/kernels", "/usr/local/etc/jupyter/kernels")
NAMELESS = (".venv", "venv", "env")  # of a project, whose name is the folder's above
LOCAL = "local-provisioner"
LONGEST = 15.0  # seconds for Jupyter to list its kernelspecs


def found() -> list[Found]:
    """Return every kernel once: by its own kernelspec before the one that we would make for its environment."""
    roots = list(prefixes())
    every: dict[str, Found] = {}
    for one in [*own_specs(roots), *(kernel for root in roots for kernel in kernels_of(root))]:
        every.setdefault(json.dumps([one["argv"][0], one["argv"][-3:]]), one)
    return list(every.values())


def prefixes() -> Iterator[str]:
    """Where Pythons are installed; each place once."""
    seen = set()
    listed = read("~/.conda/environments.txt").splitlines()
    conda = [root for start in CONDA for root in [start, os.path.join(start, "envs", "*")]]
    for pattern in [*listed, *conda, *OTHERS]:
        for path in sorted(glob.glob(os.path.expanduser(pattern))):
            real = os.path.realpath(path)
            if real not in seen and python_of(path):
                seen.add(real)
                yield path


def python_of(prefix: str) -> str:
    """The interpreter of an environment; empty: it is none."""
    is_root = prefix in ("/usr", "/usr/local")
    for name in ("python3", "python"):
        path = os.path.join(prefix, "bin", name)
        if os.access(path, os.X_OK) and (
            is_root or is_conda(prefix) or glob.glob(os.path.join(prefix, "lib*/python3*"))
        ):
            return path
    return ""


def is_conda(prefix: str) -> bool:
    return os.path.isdir(os.path.join(prefix, "conda-meta"))


def label_of(prefix: str) -> str:
    parts = prefix.rstrip("/").split("/")
    if prefix in ("/usr", "/usr/local"):
        return "system" if prefix == "/usr" else "local"
    if os.path.isdir(os.path.join(prefix, "condabin")):
        return "base"  # conda itself
    return parts[-2] if parts[-1] in NAMELESS and len(parts) > 2 else parts[-1]


# -- kernels


def kernels_of(prefix: str) -> Iterator[Found]:
    """The Python kernel of an environment, and those that have a kernelspec in it."""
    label, variables = label_of(prefix), environment_of(prefix)
    for path in glob.glob(os.path.join(prefix, "lib*/python3*/*-packages/ipykernel/__init__.py")):
        version = re.search(r"/python(3[.0-9]*)/", path)
        yield {
            "name": label,
            "display_name": "Python " + (version[1] if version else "3") + " (" + label + ")",
            "argv": [python_of(prefix), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "language": "python",
            "env": variables,
            "interrupt_mode": "signal",
            "origin": prefix,
        }
        break
    for path in sorted(glob.glob(os.path.join(prefix, "share/jupyter/kernels/*/kernel.json"))):
        kernel = kernel_of(os.path.dirname(path), json_of(read(path)), prefix)
        if kernel:
            kernel["name"] = label + "-" + kernel["name"]
            kernel["display_name"] += " (" + label + ")"
            yield kernel


def environment_of(prefix: str) -> dict[str, str]:
    """Variables that programs of an environment want, as if it were activated."""
    if prefix in ("/usr", "/usr/local"):
        return {}
    variables = {"PATH": os.path.join(prefix, "bin") + ":${PATH}"}
    if is_conda(prefix):
        variables.update(CONDA_PREFIX=prefix, CONDA_DEFAULT_ENV=label_of(prefix))
    elif os.path.exists(os.path.join(prefix, "pyvenv.cfg")):
        variables.update(VIRTUAL_ENV=prefix)
    return variables


def own_specs(roots: list[str]) -> Iterator[Found]:
    """Kernelspecs that are in no environment: the user's, and what Jupyter knows besides."""
    folders = [path for start in SPECS for path in sorted(glob.glob(os.path.join(os.path.expanduser(start), "*")))]
    within = tuple(os.path.join(root, "share/jupyter/kernels", "") for root in roots)
    folders += [path for path in listed_by_jupyter() if not path.startswith(within)]
    for path in dict.fromkeys(folders):
        kernel = kernel_of(path, json_of(read(os.path.join(path, "kernel.json"))), "")
        if kernel:
            yield kernel


def listed_by_jupyter() -> list[str]:
    """Folders of the kernelspecs that a Jupyter of this host, if there is one, lists."""
    places = os.environ.get("PATH", os.defpath) + ":" + os.path.expanduser("~/.local/bin")
    jupyter = shutil.which("jupyter", path=places)
    if not jupyter:
        return []
    try:
        ran = subprocess.run(
            [jupyter, "kernelspec", "list", "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=LONGEST,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    listed = json_of(ran.stdout.decode("utf-8", "replace")).get("kernelspecs")
    return [
        str(one["resource_dir"]) for one in (listed or {}).values() if isinstance(one, dict) and "resource_dir" in one
    ]


def kernel_of(folder: str, spec: Found, prefix: str) -> Found | None:
    """What a kernel.json says; None for one that cannot be started here as it is."""
    argv, metadata, env = spec.get("argv"), spec.get("metadata") or {}, spec.get("env") or {}
    if not isinstance(argv, list) or not argv or not isinstance(metadata, dict) or not isinstance(env, dict):
        return None
    stanza = metadata.get("kernel_provisioner")
    if isinstance(stanza, dict) and stanza.get("provisioner_name") not in (None, LOCAL):
        return None  # started elsewhere from here
    words = [str(word).replace("{resource_dir}", folder).replace("{prefix}", prefix) for word in argv]
    if re.fullmatch(r"python[0-9.]*", words[0]) and prefix:
        words[0] = python_of(prefix)  # as Jupyter does
    places = ([os.path.join(prefix, "bin")] if prefix else []) + [os.environ.get("PATH", os.defpath)]
    command = shutil.which(os.path.expanduser(words[0]), path=":".join(places))
    if not command or "{connection_file}" not in " ".join(words):
        return None
    return {
        "name": os.path.basename(folder),
        "display_name": str(spec.get("display_name") or os.path.basename(folder)),
        "argv": [command, *words[1:]],
        "language": str(spec.get("language") or ""),
        "env": {**(environment_of(prefix) if prefix else {}), **{str(name): str(env[name]) for name in env}},
        "interrupt_mode": str(spec.get("interrupt_mode") or "signal"),
        "origin": folder,
    }


def read(path: str) -> str:
    try:
        with open(os.path.expanduser(path), encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def json_of(text: str) -> Found:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
