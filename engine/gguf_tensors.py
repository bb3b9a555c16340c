"""Tensors of a GGUF file under their Hugging Face names.

llama.cpp's converter renames, and changes values in one place: Gemma 3's norms are stored as
1 + w, which is undone here in float32. Gemma 4's norms, whose w is applied as it is, and all
other tensors keep their values. A tensor nobody knows keeps its GGUF name, so that the loader's
audit stops on it.
"""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType

from bezel.engine.errors import CheckpointError
from bezel.engine.gguf import GGUFFile

if TYPE_CHECKING:
    import torch

    from bezel.engine.packing import StoredRows
    from bezel.kernels.packed import WeightFormat

_ROPE_FREQUENCIES = "rope_freqs.weight"
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "inp_gate.weight": "per_layer_input_gate.weight",
    "proj.weight": "per_layer_projection.weight",
    "post_norm.weight": "post_per_layer_input_norm.weight",
    "layer_output_scale.weight": "layer_scalar",
}


def hf_tensor_name(gguf_name: str) -> str | None:
    """The name in a text-only Hugging Face checkpoint, or None if there's no such tensor."""
    layer = _LAYER.fullmatch(gguf_name)
    if layer is None:
        return _MODEL_NAMES.get(gguf_name)
    name = _LAYER_NAMES.get(layer[2])
    return f"model.layers.{layer[1]}.{name}" if name else None


def hf_tensor_sources(file: GGUFFile) -> dict[str, list[str]]:
    """For each Hugging Face tensor the GGUF tensors it is made of, in the file's order."""
    sources: dict[str, list[str]] = {}
    for name in file.tensors:
        if name == _ROPE_FREQUENCIES:
            continue
        gate = name.replace(".ffn_up_exps.", ".ffn_gate_exps.")
        up = name.replace(".ffn_gate_exps.", ".ffn_up_exps.")
        if gate != up and _same_shape(file, gate, up):
            # Some files keep the two halves of the experts' first projection apart.
            fused = gate.replace(".ffn_gate_exps.", ".ffn_gate_up_exps.")
            sources[hf_tensor_name(fused) or fused] = [gate, up]
        else:
            sources[hf_tensor_name(name) or name] = [name]
    return sources


def hf_tensor_types(file: GGUFFile) -> dict[str, tuple[GGMLQuantizationType, ...]]:
    """For each Hugging Face tensor the types of the GGUF tensors it is made of."""
    return {
        name: tuple(file.tensors[part].type for part in parts)
        for name, parts in hf_tensor_sources(file).items()
    }


def iterate_hf_tensors(
    file: GGUFFile, format_of: Callable[[str], "WeightFormat | None"] = lambda name: None
) -> Iterator[tuple[str, "torch.Tensor | StoredRows"]]:
    """Read one tensor after the other, in float32. A matrix, or a stack of them, that `format_of`
    its name says will be packed isn't read as a whole: its rows come when they are asked for, in
    four bits if INT4 is wanted and it is stored so.

    Raises:
        CheckpointError: a tensor can't be dequantised, or frequencies that Bezel doesn't apply.
    """
    if _ROPE_FREQUENCIES in file.tensors:
        _check_rope_frequencies(file)
    is_gemma3 = file.metadata.get("general.architecture") == "gemma3"
    for name, parts in hf_tensor_sources(file).items():
        format = format_of(name)
        if format is not None:
            yield name, _stored_rows(file, parts, format)
            continue
        values = _read(file, parts, slice(None))
        if is_gemma3 and name.endswith("norm.weight"):
            values -= 1
        yield name, values


def _stored_rows(file: GGUFFile, parts: list[str], format: "WeightFormat") -> "StoredRows":
    import torch

    from bezel.engine.packing import StoredRows
    from bezel.kernels.packed import Int4Values, WeightFormat

    num_rows, *middle, columns = file.tensors[parts[0]].shape

    def read(rows: slice) -> torch.Tensor | Int4Values:
        if len(parts) == 1 and format is WeightFormat.INT4:
            in_four_bits = file.read_int4(parts[0], rows)
            if in_four_bits is not None:
                shapes = ((-1, *middle, part.shape[-1]) for part in in_four_bits)
                return Int4Values(*(p.view(s) for p, s in zip(in_four_bits, shapes, strict=True)))
        return _read(file, parts, rows)

    if middle:
        middle[0] *= len(parts)
    return StoredRows(torch.Size((num_rows, *middle, columns)), read)


def _read(file: GGUFFile, parts: list[str], rows: slice) -> "torch.Tensor":
    import torch

    values = [file.read(part, rows) for part in parts]
    return values[0] if len(values) == 1 else torch.cat(values, dim=1)


def _same_shape(file: GGUFFile, gate: str, up: str) -> bool:
    shapes = {file.tensors[name].shape if name in file.tensors else None for name in (gate, up)}
    return len(shapes) == 1


def _check_rope_frequencies(file: GGUFFile) -> None:
    """Divisors of the global layers' frequencies: Gemma 4 turns the first quarter, nothing else."""
    divisors = file.read(_ROPE_FREQUENCIES)
    turned = divisors.numel() // 4
    if bool((divisors[:turned] != 1).any()) or bool((divisors[turned:] < 1e20).any()):
        raise CheckpointError(
            f"{file.path}: {_ROPE_FREQUENCIES} doesn't turn the first quarter of the pairs; "
            "no Gemma 4 does that"
        )
