"""Give a Python kernel `spark` and `sc`, and ipykernel another kernel class."""

from __future__ import annotations

import os

from .files import write_private

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .log import Log
    from .options import Options


def adapt(argv: list[str], options: Options, folder: str, log: Log) -> list[str]:
    """Return the argv of an ipykernel with what the options ask for; other kernels' argv stays.

    Args:
        argv: The kernel's argv, placeholders filled in.
        options: `--spark-context-initialization-mode` and `--kernel-class-name`.
        folder: Private folder of the kernel, for the code that it runs first.
        log: Is told if the kernel is none that this works for.

    Raises:
        StartError: The folder is full.
    """
    if not any(word in ("ipykernel_launcher", "ipykernel") for word in argv):
        log("not an ipykernel: Spark mode and kernel class are left to it")
        return argv
    result = list(argv)
    if options.kernel_class_name:
        result.append(f"--IPKernelApp.kernel_class={options.kernel_class_name}")
    mode = options.spark_context_initialization_mode
    if mode != "none":
        path = os.path.join(folder, "spark_start.py")
        write_private(path, f"{_CODE}\n_gp_spark({mode!r}, {folder!r}, globals())\ndel _gp_spark\n")
        # Run in the user's namespace before the first message is read, and left out of %who.
        result.append(f"--IPKernelApp.exec_files={path}")
    return result


_CODE = '''\
def _gp_spark(mode, folder, namespace):
    import os
    import sys
    import threading
    import time

    def connect():
        from pyspark.sql import SparkSession

        session = SparkSession.builder.getOrCreate()
        values = {"spark": session}
        try:
            values["sc"] = session.sparkContext
        except Exception:
            pass  # Spark Connect has no context
        return values

    def explain(error):
        text = "spark and sc are not available: %s: %s" % (type(error).__name__, error)
        print(text, file=sys.stderr, flush=True)
        if sys.stderr is not sys.__stderr__:  # that went to the clients; this goes to the launcher's log
            try:
                os.write(getattr(sys.stderr, "_original_stdstream_copy", 2), (text + "\\n").encode())
            except OSError:
                pass
        return text

    found = {}
    trouble = []

    def start():
        try:
            found.update(connect())
        except Exception as error:
            trouble.append(explain(error))
        for name in ("spark", "sc"):
            if name in found and (mode == "eager" or isinstance(namespace.get(name), Pending)):
                namespace[name] = found[name]

    def start_soon():
        # IPython has the folder of this file at the head of sys.path until the file is done. Taking it out while an
        # import of another thread walks along the list makes that import skip an entry.
        for _ in range(500):
            if folder not in sys.path:
                break
            time.sleep(0.01)
        start()

    class Pending:
        """Stands for `spark` or `sc`: waits for it when it is used."""

        def __init__(self, name):
            self.__dict__["_gp_name"] = name

        def _gp_wait(self):
            if thread is not None:
                thread.join()
            if self._gp_name not in found:
                raise RuntimeError(trouble[0] if trouble else "this Spark session has no %s" % self._gp_name)
            return found[self._gp_name]

        def __getattr__(self, name):
            if name.startswith("_"):
                raise AttributeError(name)  # completion and display look for these: they must not wait
            return getattr(self._gp_wait(), name)

        def __setattr__(self, name, value):
            setattr(self._gp_wait(), name, value)

        def __repr__(self):
            return repr(self._gp_wait())

        def __dir__(self):
            return dir(found.get(self._gp_name))

    thread = None
    for name in ("spark", "sc"):
        namespace[name] = Pending(name)
    if mode == "eager":
        start()
    else:
        thread = threading.Thread(target=start_soon, name="spark-start", daemon=True)
        thread.start()
'''
