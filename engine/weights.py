"""Fills a model from a checkpoint's tensors, and refuses to start on anything unexplained.

Published checkpoints name text tensors `model.language_model.…`, older ones
`language_model.model.…`, text-only ones `model.…`. The audit: every tensor is used, or known to be
unused (vision and audio towers are reported, not dropped in silence); every parameter is filled;
every shape is equal. Beside the model there is one tensor in memory at a time, and of a GGUF file's
matrices that are packed only some rows.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from bezel.engine.errors import CheckpointError
from bezel.engine.models.decoder import Decoder
from bezel.engine.packing import Packer, Values
from bezel.kernels.packed import WeightFormat

logger = logging.getLogger("bezel")

TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
OTHER_MODALITIES = (
    "vision_tower.",
    "vision_embedder.",
    "embed_vision.",
    "multi_modal_projector.",
    "audio_tower.",
    "embed_audio.",
)
MAX_LISTED = 8


@dataclass(slots=True)
class _Audit:
    unfilled: dict[str, int]  # parameter → values still to be written
    unknown: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    not_loaded: dict[str, int] = field(default_factory=dict)  # modality prefix → tensors

    def problems(self) -> list[str]:
        missing = [name for name, count in self.unfilled.items() if count]
        found = []
        for what, names in (
            ("not in the checkpoint", missing),
            ("not known to the model", self.unknown),
            ("of another shape", self.misshapen),
        ):
            if names:
                more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
                found.append(f"{what}: {', '.join(names[:MAX_LISTED])}{more}")
        return found


def load_weights(
    model: Decoder,
    tensors: Iterable[tuple[str, Values]],
    formats: Mapping[str, WeightFormat] | None = None,
) -> None:
    """Copy every tensor to its place, converting to the parameter's dtype; parameters named in
    `formats` become packed weights. A parameter on the meta device gets its memory on the CPU when
    its first values come.

    Raises:
        CheckpointError: listing what is missing, unknown or misshapen.
    """
    audit = _Audit({name: parameter.numel() for name, parameter in model.named_parameters()})
    packer = Packer(model, formats or {})
    for checkpoint_name, tensor in tensors:
        modality = _other_modality(checkpoint_name)
        if modality:
            audit.not_loaded[modality] = audit.not_loaded.get(modality, 0) + 1
            continue
        name = text_name(checkpoint_name)
        _fill(model, packer, name, tensor, audit)
    if problems := audit.problems():
        raise CheckpointError(
            "the checkpoint doesn't fit the model; tensors " + "; ".join(problems)
        )
    for modality, count in audit.not_loaded.items():
        logger.warning("%s: %d tensors not loaded, text only so far", modality.rstrip("."), count)


def text_name(checkpoint_name: str) -> str:
    """Name of a text tensor without the prefix of whatever holds the text model."""
    for prefix in TEXT_PREFIXES:
        if checkpoint_name.startswith(prefix):
            return checkpoint_name.removeprefix(prefix)
    return checkpoint_name


def _other_modality(checkpoint_name: str) -> str | None:
    name = checkpoint_name.removeprefix("model.")
    return next((prefix for prefix in OTHER_MODALITIES if name.startswith(prefix)), None)


def _fill(model: Decoder, packer: Packer, name: str, tensor: Values, audit: _Audit) -> None:
    if model.is_ignorable(name):
        return
    target_name, rows = _target(model, name)
    if target_name not in audit.unfilled:
        audit.unknown.append(name)
        return
    shape = packer.shape(target_name, rows)
    audit.unfilled[target_name] -= prod(shape)
    if shape != tensor.shape:
        audit.misshapen.append(f"{name} {tuple(tensor.shape)}, expected {tuple(shape)}")
    elif target_name in packer.formats:
        packer.add(target_name, rows, tensor, is_last=audit.unfilled[target_name] == 0)
    else:
        assert isinstance(tensor, Tensor)
        _parameter(model, target_name).data[rows].copy_(model.convert(name, tensor))


def _parameter(model: Decoder, name: str) -> nn.Parameter:
    """The parameter, with memory."""
    parameter = model.get_parameter(name)
    if parameter.is_meta:
        module, _, leaf = name.rpartition(".")
        # Not `empty_like`: of a meta tensor that is computed in Python, by what takes a second to
        # import.
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        parameter = nn.Parameter(values, requires_grad=False)
        setattr(model.get_submodule(module), leaf, parameter)
    return parameter


def _target(model: nn.Module, name: str) -> tuple[str, slice]:
    """The parameter a tensor belongs to and its rows there: `q_proj` is part of `qkv_proj`."""
    parts = name.split(".")
    if len(parts) < 3:
        return name, slice(None)
    module, leaf, kind = ".".join(parts[:-2]), parts[-2], parts[-1]
    try:
        fused = getattr(model.get_submodule(module), "fused", {})
    except AttributeError:
        return name, slice(None)
    if leaf not in fused:
        return name, slice(None)
    fused_leaf, rows = fused[leaf]
    return f"{module}.{fused_leaf}.{kind}", rows
