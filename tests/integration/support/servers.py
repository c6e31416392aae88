"""Jupyter servers as processes of their own, and what a browser does with them: REST and one websocket a kernel."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import websocket

from support.installation import Installation, wait_until

STARTED = 40.0
"""Seconds for a server to answer its first request, on a busy machine."""

ANSWER = 60.0
"""Seconds for the longest request: a restart of a busy kernel."""

Message = dict[str, Any]


@dataclass
class Answer:
    """What a server answered.

    Args:
        status: Of HTTP.
        body: Parsed JSON, or None if there was nothing.
    """

    status: int
    body: Any

    @property
    def text(self) -> str:
        """What a client shows of an error."""
        return str(self.body["message"])


class Server:
    """A running server.

    Args:
        port: Where it listens.
        token: That it wants.
        process: That runs it.
        log: What it wrote.
        host: Where it listens, too.
    """

    def __init__(
        self, port: int, token: str, process: subprocess.Popen[bytes], log: Path, host: str = "127.0.0.1"
    ) -> None:
        self.host = host
        self.port = port
        self.token = token
        self.process = process
        self._log = log

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self.port}"

    @property
    def log(self) -> str:
        """What it wrote until now."""
        return self._log.read_text(errors="replace")

    # -- REST

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        """Send a request below `/api/`."""
        headers = {"Authorization": f"token {self.token}", "Content-Type": "application/json"}
        with closing(http.client.HTTPConnection(self.host, self.port, timeout=ANSWER)) as connection:
            connection.request(
                method, f"/api/{path}".rstrip("/"), json.dumps(body) if body is not None else None, headers
            )
            response = connection.getresponse()
            text = response.read()
            return Answer(response.status, json.loads(text) if text else None)

    def start(self, name: str, **more: Any) -> str:
        """Start a kernel and return its id."""
        answer = self.ask("POST", "kernels", {"name": name, **more})
        assert answer.status == 201, answer
        return str(answer.body["id"])

    def delete(self, kernel_id: str) -> None:
        """Delete a kernel."""
        answer = self.ask("DELETE", f"kernels/{quote(kernel_id)}")
        assert answer.status == 204, answer

    def interrupt(self, kernel_id: str) -> None:
        """Interrupt a kernel."""
        answer = self.ask("POST", f"kernels/{quote(kernel_id)}/interrupt", {})
        assert answer.status == 204, answer

    def restart(self, kernel_id: str) -> None:
        """Restart a kernel."""
        answer = self.ask("POST", f"kernels/{quote(kernel_id)}/restart", {})
        assert answer.status == 200, answer

    def kernels(self) -> dict[str, Message]:
        """The kernels that it lists, by id."""
        answer = self.ask("GET", "kernels")
        assert answer.status == 200, answer
        return {model["id"]: model for model in answer.body}

    # -- websocket

    @contextmanager
    def channels(self, kernel_id: str) -> Iterator[Channels]:
        """Open the websocket of a kernel that answers on it."""
        path = f"ws://{self.host}:{self.port}/api/kernels/{quote(kernel_id)}/channels?session_id={secrets.token_hex(8)}"
        header = [f"Authorization: token {self.token}"]
        with closing(websocket.create_connection(path, timeout=ANSWER, header=header)) as connection:
            channels = Channels(connection)
            channels.ready()
            yield channels


@dataclass
class Channels:
    """All channels of a kernel, through one websocket.

    Args:
        connection: Open.
        states: What the server itself has told of the kernel: `restarting`, `dead`.
    """

    connection: websocket.WebSocket
    states: list[str] = field(default_factory=list)

    def send(self, kind: str, content: Mapping[str, Any]) -> str:
        """Send a request on the shell channel and return its message id."""
        message_id = secrets.token_hex(16)
        header = {
            "msg_id": message_id,
            "msg_type": kind,
            "username": "",
            "session": "browser",
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": "5.3",
        }
        message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
        self.connection.send(json.dumps(message))
        return message_id

    def execute(self, code: str) -> str:
        """Send a cell and return its message id."""
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        return self.send("execute_request", {**content, "stop_on_error": False})

    def receive(self, deadline: float) -> Message:
        """Return the next message.

        Raises:
            TimeoutError: Nothing came until the deadline.
        """
        self.connection.settimeout(max(0.05, deadline - time.monotonic()))
        try:
            text = self.connection.recv()
        except websocket.WebSocketTimeoutException:
            raise TimeoutError("the kernel did not say what was waited for") from None
        message: Message = json.loads(text)
        if message["channel"] == "iopub" and message["content"].get("execution_state") in ("restarting", "dead"):
            self.states.append(message["content"]["execution_state"])
        return message

    def ready(self, within: float = ANSWER) -> None:
        """Wait until the kernel answers on shell and iopub.

        Until a new kernel knows of iopub's subscriber, what it says there is lost; so browsers, too, ask again.
        """
        deadline = time.monotonic() + within
        while True:
            message_id = self.send("kernel_info_request", {})
            try:
                self._finish(message_id, min(deadline, time.monotonic() + 1.0))
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise
            else:
                return

    def run(self, code: str, within: float = 30.0) -> str:
        """Run a cell and return what it printed, and its result or error."""
        told, _ = self._finish(self.execute(code), time.monotonic() + within)
        return told

    def start_cell(self, code: str, until: str, within: float = 30.0) -> str:
        """Send a cell and return its message id once it has printed something."""
        message_id = self.execute(code)
        deadline = time.monotonic() + within
        while True:
            message = self.receive(deadline)
            if message["parent_header"].get("msg_id") == message_id and until in message["content"].get("text", ""):
                return message_id

    def reply(self, message_id: str, within: float = 20.0) -> Message:
        """Wait for the end of a cell and return the content of its reply."""
        _, reply = self._finish(message_id, time.monotonic() + within)
        return reply

    def wait_for_state(self, state: str, within: float) -> None:
        """Wait until the server tells a state of the kernel."""
        deadline = time.monotonic() + within
        while state not in self.states:
            self.receive(deadline)

    def _finish(self, message_id: str, deadline: float) -> tuple[str, Message]:
        seen: list[str] = []
        reply: Message | None = None
        idle = False
        while reply is None or not idle:
            message = self.receive(deadline)
            content = message["content"]
            if message["parent_header"].get("msg_id") != message_id:
                continue
            if message["channel"] == "shell":
                reply = content
            elif content.get("execution_state") == "idle":
                idle = True
            else:
                seen.append(
                    content.get("text") or content.get("data", {}).get("text/plain", "") or content.get("ename", "")
                )
        return "".join(seen), reply


@contextmanager
def running(
    installation: Installation, application: str, *options: str, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a server until the end of the block, then end it as an operator does.

    Args:
        installation: Whose folders and kernelspecs it has.
        application: Module that holds it.
        options: Command line.
        env: Variables that only this server has.
    """
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    log = installation.home / f"{application}-{port}.log"
    folder = installation.home / "notebooks"
    folder.mkdir(exist_ok=True)
    # not on the command line, where everybody sees them
    tokens = {"JUPYTER_TOKEN": token, "KG_AUTH_TOKEN": token}
    argv = [sys.executable, "-m", application, f"--port={port}", "--ip=127.0.0.1", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv,
            cwd=folder,
            env={**os.environ, **tokens, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    installation.own.add(process.pid)
    server = Server(port, token, process, log)
    try:
        wait_until(lambda: _answers(server), STARTED, every=0.1)
        yield server
    except BaseException:
        print(server.log)
        raise
    finally:
        _end(server, installation)
        installation.own.discard(process.pid)


def _answers(server: Server) -> bool:
    assert server.process.poll() is None, "the server has ended"
    with suppress(OSError, http.client.HTTPException):
        return server.ask("GET", "").status == 200
    return False


def _end(server: Server, installation: Installation) -> None:
    process = server.process
    process.send_signal(signal.SIGTERM)
    try:
        # a server that is stuck goes on with the end of its other kernels
        wait_until(lambda: process.poll() is not None or (_stuck(server) and not installation.records()), 30)
    finally:
        process.kill()
        process.wait(10)


def _stuck(server: Server) -> bool:
    # Upstream, with its local provisioner as well (jupyter_client 8.10, jupyter_server 2.21): a start that failed stays
    # among the manager's pending kernels; shutdown_all falls over it, and the server goes on without its end.
    return "HTTP 404: Not Found (Kernel does not exist" in server.log.partition("received signal")[2]


def jupyter_server(installation: Installation, *options: str, **kwargs: Any) -> Any:
    """Run Jupyter Server."""
    fixed = ("--no-browser", "--allow-root", "--ServerApp.port_retries=0", "--ServerApp.jpserver_extensions={}")
    return running(installation, "jupyter_server", *fixed, *options, **kwargs)


def kernel_gateway(installation: Installation, *options: str, **kwargs: Any) -> Any:
    """Run Kernel Gateway; it lists its kernels, as a server in front of it wants to know them."""
    fixed = ("--KernelGatewayApp.port_retries=0", "--JupyterWebsocketPersonality.list_kernels=True")
    return running(installation, "kernel_gateway", *fixed, *options, **kwargs)


@contextmanager
def server_behind_gateway(
    installation: Installation, *options: str, env: Mapping[str, str] | None = None
) -> Iterator[tuple[Server, Server]]:
    """Run Kernel Gateway, and Jupyter Server with `--gateway-url`; the server first, then the gateway.

    Args:
        installation: Of both.
        options: Command line of the gateway.
        env: Variables of the server.
    """
    with kernel_gateway(installation, *options) as gateway:
        more = {"JUPYTER_GATEWAY_AUTH_TOKEN": gateway.token, **(env or {})}
        with jupyter_server(installation, f"--gateway-url={gateway.url}", env=more) as server:
            yield server, gateway


# -- JupyterLab

LAB_SETTINGS = {
    # neither dialogs nor traffic of its own
    "@jupyterlab/apputils-extension:notification": {"checkForUpdates": False, "fetchNews": "false"},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    # every cell is in the page, and holds what was typed
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/codemirror-extension:plugin": {"defaultConfig": {"autoClosingBrackets": False}},
}


def jupyter_lab(installation: Installation, *options: str, **kwargs: Any) -> Any:
    """Run JupyterLab, and its server."""
    folder = installation.jupyter.config_dir / "labconfig"
    folder.mkdir(exist_ok=True)
    (folder / "default_setting_overrides.json").write_text(json.dumps(LAB_SETTINGS))
    fixed = (
        "--no-browser",
        "--allow-root",
        "--ServerApp.port_retries=0",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.extension_manager=readonly",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.news_url=",
    )
    return running(installation, "jupyterlab", *fixed, *options, **kwargs)


@contextmanager
def lab_behind_gateway(installation: Installation, *, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run Kernel Gateway, and JupyterLab with `--gateway-url`.

    Args:
        installation: Of both.
        env: Variables of the gateway.
    """
    with kernel_gateway(installation, env=env) as gateway:
        more = {"JUPYTER_GATEWAY_AUTH_TOKEN": gateway.token}
        with jupyter_lab(installation, f"--gateway-url={gateway.url}", env=more) as lab:
            yield lab
