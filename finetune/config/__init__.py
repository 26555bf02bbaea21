"""Settings: what there are, how they are given, and what no run can use.

Defaults live in `schema`, and `conf/` holds choices. Components never see these classes: `build` hands them plain
values.

schema          typed dataclasses with their defaults, which `--help` reads
overrides       KEY=VALUE, as a command line has it
composition     overrides and choices -> a `Config`, or another command's schema from its own folder of choices
limits          refusing values
"""

from finetune.config.composition import (
    compose,
    conf_dir,
    groups,
)
from finetune.config.limits import (
    LARGEST,
    LARGEST_SIDE,
    LARGEST_SIZE,
    require,
    require_bounds,
    require_choice,
    require_finite,
    require_sizes,
)
from finetune.config.overrides import (
    is_free_form,
    is_section,
    nodes,
    parse_override,
    quoted,
    written,
)
from finetune.config.schema import (
    AdapterConfig,
    AveragesConfig,
    CheckpointConfig,
    Config,
    CopiedCheckpointConfig,
    DataConfig,
    EmaConfig,
    JointOptimConfig,
    LoopConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    SchedulerConfig,
    StrategyConfig,
    TaskConfig,
    TextEncoderConfig,
    TrackerConfig,
    ValidationConfig,
    WatchConfig,
    data_sources,
)

__all__ = [
    "LARGEST",
    "LARGEST_SIDE",
    "LARGEST_SIZE",
    "AdapterConfig",
    "AveragesConfig",
    "CheckpointConfig",
    "Config",
    "CopiedCheckpointConfig",
    "DataConfig",
    "EmaConfig",
    "JointOptimConfig",
    "LoopConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RunConfig",
    "SampleConfig",
    "SchedulerConfig",
    "StrategyConfig",
    "TaskConfig",
    "TextEncoderConfig",
    "TrackerConfig",
    "ValidationConfig",
    "WatchConfig",
    "compose",
    "conf_dir",
    "data_sources",
    "groups",
    "is_free_form",
    "is_section",
    "nodes",
    "parse_override",
    "quoted",
    "require",
    "require_bounds",
    "require_choice",
    "require_finite",
    "require_sizes",
    "written",
]
