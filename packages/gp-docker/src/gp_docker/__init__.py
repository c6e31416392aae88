"""Run Jupyter kernels in containers, of any image that has Python and the kernel.

`backend` and `swarm` are what gp-core sees; `on_engine` is their base. Below are `options`, `connection` (which
engine), `engine` (what is asked of it and what it tells by itself), `images`, `container` (what a container is made of)
and `states` (what its states mean).
"""

__version__ = "0.1.0"
