"""promoe: ProMoE diffusion transformers, trained and sampled in C."""

from promoe import ops
from promoe._core import backend_info, get_num_threads, set_num_threads
from promoe.config import ModelConfig, RectifiedFlow, preset, presets
from promoe.model import LossAndGrad, Model, Routing, StepInfo, memory_estimate

__version__ = "0.1.0"
__all__ = ["LossAndGrad", "Model", "ModelConfig", "RectifiedFlow", "Routing", "StepInfo", "backend_info",
           "get_num_threads", "memory_estimate", "ops", "preset", "presets", "set_num_threads"]
