"""Triton kernels and what launches them; each does the same as a function in plain torch elsewhere in the package.

`runtime` decides when they are used and is the only module that loads them. Files named ``*_kernels.py`` hold device
code and import Triton; the others import torch only, so that nothing loads Triton before a kernel is launched.
"""
