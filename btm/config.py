"""The whole configuration, typed and checked before anything runs; each section has a file ``config_<section>.py``.

Hydra composes YAML and command-line overrides (``btm/cli.py``); :func:`btm.config_parse.parse_config` turns the result
into these frozen models. Unknown keys, wrong types and bad values are all reported together. Below the command line
only these models are used. The text under each field is its documentation: first words are unit and range.
"""

from pydantic import Field

from btm.config_data import DataConfig, TokenizerConfig
from btm.config_ensemble import EnsembleConfig, EvaluateConfig, GenerateConfig
from btm.config_ffn import FfnConfig
from btm.config_launch import LaunchConfig, SlurmAction, TrackingConfig
from btm.config_merge import MergeConfig
from btm.config_model import EngineConfig, ModelConfig
from btm.config_train import BaselineConfig, BranchConfig, TrainConfig
from btm.schema import Model


class Config(Model):
    """One run: a forest and everything that trains, merges and evaluates it."""

    name: str = "forest"
    """Name of the run."""
    forest: str = "outputs/${name}"
    """Forest directory."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Root of every random choice."""
    dry_run: bool = False
    """Print the plan and stop."""
    allow_config_change: bool = False
    """Go on in a forest that was begun with another configuration."""
    domain: str | None = None
    """Domain that ``add``, ``remove`` and ``inspect`` speak of."""
    steps: list[str] = []
    """Steps that ``step`` runs, in this order, such as ``[prepare,seed]`` or ``[elm/law]``."""
    element: int | None = Field(default=None, ge=0)
    """Number of the one training after the seed that ``step`` runs: an array job's element."""
    elm: str | None = None
    """ELM whose training ``export-task`` takes out of the forest."""
    output: str | None = None
    """New directory that ``export-task`` writes."""
    task: str | None = None
    """Directory of an exported task: ``btm step <directory>`` trains it, ``btm import <directory>`` lets its ELM join."""
    action: SlurmAction = SlurmAction.jobs
    """What ``slurm`` does with a forest's jobs: list, follow or cancel them, or submit the run as an array."""
    output_json: bool = Field(default=False, alias="json")
    """Print JSON instead of tables."""
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    ffn: FfnConfig = FfnConfig()
    train: TrainConfig = TrainConfig()
    branch: BranchConfig = BranchConfig()
    baselines: BaselineConfig = BaselineConfig()
    engine: EngineConfig = EngineConfig()
    merge: MergeConfig = MergeConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()
    launch: LaunchConfig = LaunchConfig()
    tracking: TrackingConfig = TrackingConfig()
