"""Run Jupyter kernels on hosts, over ssh.

`backend` is what gp-core sees; below it are `hosts` (which there are), `connection` (one ssh connection and its pool),
`host` (what is asked of a host), `far` (the answers, given by a script that runs over there) and `forward` (launchers
that call back through ssh).
"""

__version__ = "0.1.0"
