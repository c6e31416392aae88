"""Everything that is checked here. `pip install nox` is all it needs; uv is used if it is there."""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests", "contract"]

ROOT = Path(__file__).parent
WORKSPACE = nox.project.load_toml("pyproject.toml")
PROJECTS = {path.parent.name: nox.project.load_toml(path) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))}
# for any Python from 3.8 on
FAR_SIDE = ("packages/gp-launchers/src", "packages/gp-ssh/src/gp_ssh/far.py")
each_package = nox.parametrize("package", [nox.param(name, id=name) for name in PROJECTS])


# Helpers


def lower_bounds(package: str) -> dict[str, str]:
    """Dependencies of a package with the oldest version that it says to support."""
    found = {}
    for requirement in PROJECTS[package]["project"]["dependencies"]:
        if match := re.match(r"([\w.-]+)>=([\w.]+)", requirement):
            found[match[1]] = match[2]
    return found


def editable(*packages: str) -> list[str]:
    """Arguments to install packages from here, and those of ours that they need.

    Editable, so never stale; by path and never by name, because an index may have another package of that name.
    """
    needed = list(dict.fromkeys(packages))
    for package in needed:  # grows meanwhile: what these need, needs more
        needed += [name for name in lower_bounds(package) if name in PROJECTS and name not in needed]
    return [argument for package in needed for argument in ("-e", f"packages/{package}")]


def group(name: str) -> tuple[str, ...]:
    """Requirements of a dependency group of the workspace."""
    return nox.project.dependency_groups(WORKSPACE, name)


def install_with_tests(session: nox.Session, package: str, *more: str) -> None:
    """Install a package with its test dependencies, and nothing else of this repository."""
    tools = nox.project.dependency_groups(PROJECTS[package], "test")
    session.install(*editable(package), *tools, *more)


def interpreters() -> dict[str, str]:
    """Every CPython from 3.8 on of this machine: version and path."""
    # pyenv's shims answer only for the versions it has activated, so look behind them
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found = {}
    for version in (f"3.{minor}" for minor in range(8, 30)):
        behind = [str(path) for path in pyenv.glob(f"{version}.*/bin/python")]
        if path := next(iter(behind), None) or shutil.which(f"python{version}"):
            found[version] = path
    return found


# What everybody runs


@nox.session
def demo(session: nox.Session) -> None:
    """Start a kernel through the whole protocol on this machine, and show what it does."""
    session.install(*editable("gp-core"), "ipykernel")
    session.run("jupyter", "gp", "demo", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, architecture, and what gp-launchers may use."""
    session.install(*group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    sources = os.pathsep.join(str(ROOT / "packages" / name / "src") for name in PROJECTS)
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": sources})
    # ruff knows the syntax of 3.8, vermin also its library; pidfds are used where the Python has them
    guarded = ("--exclude", "os.pidfd_open", "--exclude", "signal.pidfd_send_signal")
    session.run("vermin", "--target=3.8-", "--violations", "--no-tips", *guarded, *FAR_SIDE)
    if strangers := [name for path in FAR_SIDE for name in foreign_imports(ROOT / path)]:
        session.error("what runs on the far side must import the standard library only:\n" + "\n".join(strangers))


def foreign_imports(source: Path) -> list[str]:
    """Absolute imports from outside the standard library and the package: import-linter cannot say that."""
    files = sorted(source.rglob("*.py")) if source.is_dir() else [source]
    allowed = {*sys.stdlib_module_names, *(path.parent.name for path in files if source.is_dir())}
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            found += [f"{path}:{node.lineno}: {name}" for name in names if name.split(".")[0] not in allowed]
    return found


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict, over everything that is published."""
    session.install(*editable(*PROJECTS), *group("types"))
    session.run("mypy", *(f"packages/{name}/src" for name in PROJECTS))


@nox.session
@each_package
def tests(session: nox.Session, package: str) -> None:
    """Tests of one package, in an environment that has only what it asks for."""
    install_with_tests(session, package)
    session.run("pytest", "-m", "not contract", f"packages/{package}/tests", *session.posargs)


@nox.session
def contract(session: nox.Session) -> None:
    """The contract suite, against the fakes and the embedded backend."""
    install_with_tests(session, "gp-core")
    session.run("pytest", "-m", "contract", "packages/gp-core/tests", *session.posargs)


# What needs more of the machine


@nox.session
def integration(session: nox.Session) -> None:
    """Real clients and clusters: `-- NAME…` demands those (no skips), no name means what is here."""
    folder = ROOT / "tests/integration"
    names = [argument for argument in session.posargs if not argument.startswith("-")]
    options = [argument for argument in session.posargs if argument.startswith("-")]
    paths = []
    for name in names:
        found = sorted(folder.glob(f"test_{name}*.py")) + [path for path in [folder / name] if path.is_dir()]
        if not found:
            session.error(f"no tests for {name!r}: {folder} has neither test_{name}*.py nor {name}/")
        paths += found
    examples = [path.parent for path in sorted(ROOT.glob("examples/gp-*/pyproject.toml"))]
    wanted = [path for path in examples if not names or path.name.removeprefix("gp-") in names]
    session.install(*editable(*PROJECTS), *group("integration"), *(arg for path in wanted for arg in ("-e", str(path))))
    # whoever names tests wants all of what they use: a skip in them is a failure
    env = {"GP_TEST_REQUIRE": "all"} if names else {}
    session.run("pytest", *options, *map(str, paths or [folder]), env=env)


@nox.session
def bench(session: nox.Session) -> None:
    """Side by side with the local provisioner and with gateway_provisioners, the peer; `-- --json FILE`."""
    session.install(*editable(*PROJECTS), *group("bench"))
    session.run("python", "benchmarks", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    session.install(*editable(*PROJECTS), *group("docs"))
    session.run("sphinx-build", "-W", "--keep-going", *session.posargs, "docs", "docs/_build/html")


@nox.session
def build(session: nox.Session) -> None:
    """Make wheels and sdists, and use the wheels alone in an empty environment."""
    session.install(*group("build"))
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for name in PROJECTS:
        session.run("python", "-m", "build", "--outdir", str(dist), f"packages/{name}")
    session.run("twine", "check", "--strict", *map(str, sorted(dist.iterdir())))
    empty = Path(session.virtualenv.location).resolve() / "empty"
    session.run("virtualenv", "--quiet", "--clear", str(empty))
    session.run(str(empty / "bin/pip"), "install", "--quiet", *map(str, dist.glob("*.whl")), external=True)
    with session.chdir(empty):  # away from the sources
        session.run(str(empty / "bin/jupyter"), "gp", "list", external=True)


# virtualenv no longer makes environments for Python 3.8; a new one each time has the newest of everything
@nox.session(venv_backend="uv|venv", reuse_venv=False)
@nox.parametrize("python", [nox.param(path, id=version) for version, path in interpreters().items()])
def compat(session: nox.Session) -> None:
    """Every Python of this machine with the newest dependencies, the oldest one also with the oldest."""
    minor = int(session.run("python", "-c", "import sys; print(sys.version_info[1])", silent=True))
    install_with_tests(session, "gp-launchers")
    session.run("pytest", "packages/gp-launchers/tests", *session.posargs)
    if minor < 10:  # the far side only
        return
    install_with_tests(session, "gp-core")
    session.run("pytest", "packages/gp-core/tests", *session.posargs)
    if minor > 10:  # old releases have no wheels for Pythons that came later
        return
    # not create_tmp(): it moves TMPDIR into .nox, where paths of sockets get too long
    oldest = Path(session.virtualenv.location) / "oldest.txt"
    bounds = {name: version for name, version in lower_bounds("gp-core").items() if name not in PROJECTS}
    oldest.write_text("".join(f"{name}=={version}\n" for name, version in bounds.items()))
    install_with_tests(session, "gp-core", "-c", str(oldest))
    # what old releases say of the Python and the libraries of today is not our fault
    session.run("pytest", "-W", "ignore::DeprecationWarning", "packages/gp-core/tests", *session.posargs)
