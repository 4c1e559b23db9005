"""Loads the models of a checkout of the public PyTorch code (github.com/ali-vilab/ProMoE, MIT), unmodified.

Only what keeps it from running on a CPU without further packages is stood in for: `timm`, of which it uses the
patch embedding (a convolution with kernel = stride, flattened) and the two-layer MLP, is replaced by those few lines.
"""

import contextlib
import importlib
import io
import sys
import types
from pathlib import Path


class _Config(dict):
    """A mapping that is also read by attribute, as the public code does with its YAML."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _stand_in_for_timm():
    import torch

    class PatchEmbed(torch.nn.Module):
        def __init__(self, img_size, patch_size, in_chans, embed_dim, bias=True):
            super().__init__()
            self.patch_size = (patch_size, patch_size)
            self.num_patches = (img_size // patch_size) ** 2
            self.proj = torch.nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

        def forward(self, x):
            return self.proj(x).flatten(2).transpose(1, 2)

    class Mlp(torch.nn.Module):
        def __init__(self, in_features, hidden_features, act_layer, drop=0):
            super().__init__()
            self.fc1 = torch.nn.Linear(in_features, hidden_features)
            self.act = act_layer()
            self.fc2 = torch.nn.Linear(hidden_features, in_features)

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    names = ["timm", "timm.models", "timm.models.vision_transformer"]
    for name in names:
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules[names[-1]].PatchEmbed, sys.modules[names[-1]].Mlp = PatchEmbed, Mlp


def load(repo, model, moe=None, **arguments):
    """One network of the public code.

    Parameters
    ----------
    repo : path
        A checkout of the public code.
    model : {"DiT", "ProMoE_TC"}
    moe : dict, optional
        The `MoE_config` of a routed model, with the public names.
    **arguments
        The public constructor's own arguments.
    """
    if not (Path(repo) / "models" / f"models_{model}.py").is_file():
        raise FileNotFoundError(f"{repo} is not a checkout of the public code: no models/models_{model}.py")
    if str(repo) not in sys.path:
        sys.path.insert(0, str(repo))
    _stand_in_for_timm()
    module = importlib.import_module(f"models.models_{model}")
    if moe is not None:
        arguments["MoE_config"] = _Config({"init_MoeMLP": False, "interleave": True, **moe})
    with contextlib.redirect_stdout(io.StringIO()):
        return module.DiT(**arguments)
