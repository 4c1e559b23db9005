"""promoe: ProMoE diffusion transformers, trained and sampled in C."""

from promoe import ops
from promoe._core import backend_info, get_num_threads, set_num_threads
from promoe.config import ModelConfig, RectifiedFlow, preset, presets

__version__ = "0.1.0"
__all__ = ["ModelConfig", "RectifiedFlow", "backend_info", "get_num_threads", "ops", "preset", "presets",
           "set_num_threads"]
