"""JupyterLab's page in Chromium without a window, and what an analyst does there: clicks, types, reads.

Elements are found by roles and labels where JupyterLab has them, otherwise by classes that outlived its minor releases.
The little circle of the toolbar says idle before there is a kernel; so the kernel's state is read where the page itself
has it, from its session context.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clusters.availability import Unavailable
from playwright.sync_api import Browser, Locator, Page, Response, expect, sync_playwright
from playwright.sync_api import TimeoutError as TooLate

PATIENCE = 60.0
"""Seconds for whatever the page or a kernel does, on a busy machine."""

FLAGS = (
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the browser reaches nothing but this machine
)

SESSION = "const context = window.jupyterapp.shell.currentWidget?.sessionContext, kernel = context?.session?.kernel"
READY = f"""wanted => {{ {SESSION};
    return kernel?.connectionStatus === 'connected' && wanted.includes(context.kernelDisplayStatus) }}"""
STATE = f"""() => {{ {SESSION};
    return {{display: context?.kernelDisplayStatus, connection: kernel?.connectionStatus, id: kernel?.id}} }}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run the browser of this machine until the end of the block.

    Raises:
        Unavailable: There is none.
    """
    program = shutil.which("chromium")
    if program is None:
        raise Unavailable("needs: apt-get install --no-install-recommends chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class LabPage:
    """A page with JupyterLab.

    Args:
        page: Empty.
        shots: Folder for screenshots.
    """

    def __init__(self, page: Page, shots: Path) -> None:
        self.page = page
        self._shots = shots
        self._taken = 0
        page.set_default_timeout(PATIENCE * 1000)

    def open(self, url: str, token: str) -> None:
        """Load the page and wait for its launcher."""
        self.page.goto(f"{url}/lab?token={token}&reset", wait_until="domcontentloaded")
        self.page.locator(".jp-LauncherCard:visible").first.wait_for()
        self.page.evaluate("() => window.jupyterapp.restored.then(() => true)")
        self.page.locator("#jupyterlab-splash").wait_for(state="detached")

    def keep(self, name: str) -> None:
        """Take a screenshot."""
        self._taken += 1
        self.page.screenshot(path=self._shots / f"{self._taken:02}-{name}.png")

    def wait(self, seconds: float) -> None:
        """Let time pass, while the page goes on."""
        self.page.wait_for_timeout(seconds * 1000)

    # -- menus and dialogs

    def menu(self, name: str, entry: str) -> None:
        """Choose an entry of the menu bar."""
        self.page.locator("#jp-MainMenu").get_by_role("menuitem", name=name, exact=True).click()
        label = self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{re.escape(entry)}(…|\\.\\.\\.)?$"))
        self.page.locator(".lm-Menu .lm-Menu-item", has=label).first.click()

    @property
    def dialogs(self) -> Locator:
        """The dialogs that are open."""
        return self.page.locator(".jp-Dialog")

    def dialog(self) -> str:
        """Wait for a dialog and return its text."""
        self.dialogs.last.wait_for()
        return self.dialogs.last.inner_text()

    def accept(self) -> None:
        """Press a dialog's last button, and wait until it is gone; there may be another one then."""
        dialog = self.dialogs.last.element_handle()
        self.dialogs.last.locator("button.jp-mod-accept").click()
        dialog.wait_for_element_state("hidden")

    def choose_kernel(self, kernel: str) -> None:
        """Choose a kernel in the dialog for it, by the name that is shown."""
        self.page.get_by_role("dialog").locator("select").select_option(label=kernel)
        self.accept()

    # -- the notebook in front and its kernel

    @property
    def notebook(self) -> Locator:
        """The notebook in front."""
        return self.page.locator("#jp-main-dock-panel .jp-NotebookPanel:not(.lm-mod-hidden)").last

    def click_card(self, kernel: str) -> None:
        """Choose a kernel in the launcher, by the name that is shown."""
        if not self.page.locator(".jp-LauncherCard:visible").count():
            self.menu("File", "New Launcher")
        self.page.locator(f'.jp-LauncherCard[data-category="Notebook"][title="{kernel}"]:visible').click()

    def new_notebook(self, kernel: str) -> None:
        """Choose a kernel in the launcher and wait for it."""
        self.click_card(kernel)
        self.wait_for_new_kernel()

    def change_kernel(self, kernel: str) -> None:
        """Choose another kernel by the button at the top right, and wait for it."""
        self.notebook.locator(".jp-Toolbar-kernelName").click()
        self.choose_kernel(kernel)
        self.wait_for_new_kernel()

    @property
    def kernel_name(self) -> str:
        """What the button at the top right says."""
        return self.notebook.locator(".jp-Toolbar-kernelName").inner_text().strip()

    @property
    def state(self) -> dict[str, Any]:
        """What the page knows of the kernel: its status, its connection, its id."""
        state: dict[str, Any] = self.page.evaluate(STATE)
        return state

    def wait_for_kernel(self, *statuses: str) -> None:
        """Wait for a kernel that is connected and idle, or of one of these statuses.

        The page drops a cell that is run before, without a word.
        """
        wanted = list(statuses) or ["idle"]
        try:
            self.page.wait_for_function(READY, arg=wanted)
        except TooLate:
            shown = self.dialogs.all_inner_texts()
            raise AssertionError(f"the kernel is not {' or '.join(wanted)}: {self.state}; {shown}") from None

    def wait_for_new_kernel(self) -> None:
        """Wait for a kernel that the page has asked for, and connect again if it does not hear this page.

        The page connects twice at once. Behind a gateway, both connections are one client to the kernel, which hears
        the last one; with local kernels of jupyter_client too (2 of 21), that is not always the page's last one.
        """
        try:
            self.page.wait_for_function(READY, arg=["idle"], timeout=10_000)
        except TooLate:
            self.menu("Kernel", "Reconnect to Kernel")
            self.wait_for_kernel("idle", "unknown")

    def interrupt(self) -> None:
        """Press the stop button."""
        self.notebook.locator('[data-command="notebook:interrupt-kernel"]').first.click()

    def restart(self) -> None:
        """Restart the kernel by the menu, and wait for it."""

        def is_restart(response: Response) -> bool:
            return response.request.method == "POST" and response.url.split("?")[0].endswith("/restart")

        self.menu("Kernel", "Restart Kernel")
        with self.page.expect_response(is_restart) as caught:
            self.accept()
        assert caught.value.ok, caught.value.text()
        self.wait_for_kernel()

    # -- cells, numbered from 0

    @property
    def cells(self) -> Locator:
        """All cells of the notebook in front."""
        return self.notebook.locator(".jp-CodeCell")

    def start(self, code: str) -> int:
        """Run code in the last cell, which is empty, and return its number at once."""
        number = self.cells.count() - 1
        editor = self.cells.nth(number).locator(".cm-content")
        editor.click()
        self.page.keyboard.insert_text(code)  # at one go: nothing is completed or indented
        expect(editor.locator(".cm-line")).to_have_text(code.split("\n"))
        self.page.keyboard.press("Shift+Enter")
        expect(self.cells).to_have_count(number + 2)
        return number

    def wait_for_end(self, cell: int, within: float = PATIENCE) -> None:
        """Wait until a cell has ended."""
        prompt = self.cells.nth(cell).locator(".jp-InputArea-prompt")
        expect(prompt).to_have_text(re.compile(r"^\[\d+\]:$"), timeout=within * 1000)

    def run(self, code: str) -> str:
        """Run code in the last cell, and return what is then below it."""
        cell = self.start(code)
        self.wait_for_end(cell)
        self.wait_for_kernel()
        return self.output(cell)

    def output(self, cell: int) -> str:
        """What is below a cell."""
        return "\n".join(self.cells.nth(cell).locator(".jp-OutputArea-output").all_inner_texts()).strip()

    def wait_for_output(self, cell: int, text: str) -> None:
        """Wait until a text is below a cell."""
        self.cells.nth(cell).locator(".jp-OutputArea-output", has_text=text).first.wait_for()
