"""promoe: ProMoE diffusion transformers, trained and sampled in C."""

from promoe.config import ModelConfig, RectifiedFlow, preset, presets

__all__ = ["ModelConfig", "RectifiedFlow", "preset", "presets"]
