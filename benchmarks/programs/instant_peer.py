"""The same kernel with the peer's launcher code in front: `server_listener` must be importable (PYTHONPATH)."""

import argparse
import os
import tempfile

from instant_kernel import main
from server_listener import setup_server_listener

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option in ("--kernel-id", "--response-address", "--public-key"):
        parser.add_argument(option, required=True)
    given = parser.parse_args()
    descriptor, path = tempfile.mkstemp(suffix=".json")
    os.close(descriptor)
    setup_server_listener(path, os.getpid(), 0, 0, given.response_address, given.kernel_id, given.public_key)
    main(path)
