"""Packages of the distribution; everything else is in pyproject.toml.

`sda_fast/kernels` is a link to the top-level folder `kernels/`, which has no `__init__.py` on purpose: seen from the
repository root it is then only a namespace, and an installed distribution whose import name is `kernels`
(transformers and bitsandbytes look for it) wins over it.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["sda_fast", "sda_fast.*"]), "sda_fast.kernels"])
