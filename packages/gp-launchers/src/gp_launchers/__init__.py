"""The launcher of gateway provisioners: starts a kernel, watches it and keeps one TLS session to its server.

Standard library only, Python 3.8 and newer: it runs wherever a kernel can run.
"""

__version__ = "0.1.0"
