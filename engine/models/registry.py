"""From a model's shape to its code."""

import torch

from bezel.engine.model_config import ModelConfig
from bezel.engine.models.decoder import Decoder
from bezel.engine.models.gemma3 import Gemma3Decoder
from bezel.engine.models.gemma4 import Gemma4Decoder

FAMILIES: dict[str, type[Decoder]] = {"gemma3": Gemma3Decoder, "gemma4": Gemma4Decoder}


def build_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    """An empty model on `device`; its parameters hold nothing until `load_weights` fills them."""
    with torch.device("meta"):
        model = FAMILIES[config.family](config, dtype)
    if device.type != "meta":
        model.to_empty(device=device)
    return model.eval().requires_grad_(False)
