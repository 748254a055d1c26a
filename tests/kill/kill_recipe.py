"""What is trained while it is killed: small enough for minutes, long enough to be hit."""

from tests.conftest import SMOKE

DOMAINS = ("code", "docs", "mail")
RECIPE = (
    *SMOKE,
    "engine.dtype=fp32",
    "baselines=dense",
    "data.max_documents=100",
    "data.num_workers=1",
    "model.num_layers=1",
    "train.tokens=172800",
    "train.batch_tokens=192",
    "train.sequence_length=32",
    "train.checkpoint_every=10",
    "train.eval_every=50",
    "train.eval_tokens=512",
    "train.log_every=1",
    "evaluate.max_tokens=1024",
    "launch.max_restarts=100",
)
"""450 updates of the seed model, 450 of each ELM and of the dense one; a checkpoint every 10."""
