"""promoe: ProMoE diffusion transformers, trained and sampled in C."""

__version__ = "0.1.0"

from promoe import ops
from promoe._core import DeviceArray, backend_info, get_num_threads, set_num_threads
from promoe.checkpoint import CheckpointError, load, save
from promoe.config import ModelConfig, RectifiedFlow, preset, presets
from promoe.data import load_digits
from promoe.model import LossAndGrad, Model, Routing, StepInfo, memory_estimate
from promoe.sample import sample
from promoe.train import TrainResult, train

__all__ = ["CheckpointError", "DeviceArray", "LossAndGrad", "Model", "ModelConfig", "RectifiedFlow", "Routing", "StepInfo",
           "TrainResult", "backend_info", "get_num_threads", "load", "load_digits", "memory_estimate", "ops",
           "preset", "presets", "sample", "save", "set_num_threads", "train"]
