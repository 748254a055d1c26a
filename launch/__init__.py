"""Run tasks (a command, resources, an environment, a log) somewhere: local processes or Ray.

Knows nothing of language models and imports nothing of ``btm`` or ``moe_kernels``.
"""
