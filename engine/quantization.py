"""Which format each weight is kept in: `--quantization`, and what a GGUF file stores.

    auto    of a GGUF that `--dtype auto` serves on a CPU, the nearest format to each tensor's own:
            up to 4 bits a value INT4, 5 and more INT8; else weights in the model's dtype
    none    weights in the model's dtype
    int8    INT8: all matrices
    int4    INT4: the matrices of the layers; INT8: tables of embeddings and the output head

On a CPU a matrix that is stored in bfloat16 stays so in a model of float32 too: nothing is lost,
and it takes half of the memory.

Norms, scalars and the router's matrix, which is small and decides a lot, are never rounded. A
matrix whose rows aren't whole groups of 32 keeps the model's dtype.
"""

from collections.abc import Iterable, Mapping

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from bezel.engine.checkpoint import Checkpoint, stored_dtypes
from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.engine.gguf_tensors import hf_tensor_types
from bezel.engine.models.decoder import Decoder
from bezel.engine.weights import text_name
from bezel.kernels.packed import WeightFormat

Types = Mapping[str, tuple[Kind, ...]]

_TABLES = ("embed_tokens.weight", "embed_tokens_per_layer.weight", "lm_head.weight")
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
_SAFETENSORS = {"BF16": Kind.BF16, "F16": Kind.F16}
# From the least to the most precise; None is the model's dtype.
_BY_PRECISION = (WeightFormat.INT4, WeightFormat.INT8, None)
# A value's bits with its share of scales and minima: INT4 itself takes 5, Q5_0 takes 5.5.
_MOST_BITS_OF_INT4, _LEAST_BITS_OF_PLAIN = 5, 16
# Sixteen steps of unequal size, which those of INT4 would miss.
_UNEVEN = (Kind.IQ4_NL, Kind.IQ4_XS, Kind.MXFP4, Kind.NVFP4)


def stored_types(checkpoint: Checkpoint) -> Types:
    """The types of the tensors that each text tensor is made of, in GGUF's terms; F32 stands for
    whatever safetensors has besides floats of 16 bits.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if checkpoint.format != "gguf":
        dtypes = stored_dtypes(checkpoint)
        return {text_name(n): (_SAFETENSORS.get(d, Kind.F32),) for n, d in dtypes.items()}
    types = hf_tensor_types(checkpoint.gguf)
    return {name.removeprefix("model."): kinds for name, kinds in types.items()}


def choose_formats(
    config: EngineConfig, model: Decoder, is_gpu: bool, stored: Types
) -> dict[str, WeightFormat]:
    """Formats of the parameters of `model`, by name, without those that keep the model's dtype.

    `model` may be on the meta device: only shapes are looked at. `stored` is `stored_types`.

    Raises:
        ConfigError: the device has no kernels for the format.
    """
    choice = config.quantization
    if is_gpu and choice not in ("auto", "none"):
        raise ConfigError(
            f"--quantization {choice} runs on CPUs only; use --device cpu, or leave it out for "
            "weights in --dtype on a GPU"
        )
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    matrices = [name for name, shape in shapes.items() if len(shape) > 1 and ".router." not in name]
    wanted: Mapping[str, WeightFormat | None] = {}
    if choice in ("int8", "int4"):
        wanted = {name: _asked_for(choice, name) for name in matrices}
    elif choice == "auto" and config.dtype == "auto" and not is_gpu:
        wanted = _nearest(model, stored)
    return {
        name: format
        for name in matrices
        if (format := wanted.get(name)) is not None and shapes[name][-1] % format.granularity == 0
    }


def bfloat16_matrices(model: Decoder) -> dict[str, WeightFormat]:
    """Every matrix that the kernels for CPUs can take in bfloat16."""
    format = WeightFormat.BFLOAT16
    return {
        name: format
        for name, value in model.named_parameters()
        if value.ndim > 1 and value.shape[-1] % format.granularity == 0
    }


def stored_in_bfloat16(model: Decoder, stored: Types) -> dict[str, WeightFormat]:
    """Those of `bfloat16_matrices` that lose nothing by it, whatever the model's dtype."""
    kinds: dict[str, set[Kind]] = {}
    for name, found in stored.items():
        if not model.is_ignorable(name):
            kinds.setdefault(parameter_of(name), set()).update(found)
    matrices = bfloat16_matrices(model).items()
    return {name: format for name, format in matrices if kinds.get(name) == {Kind.BF16}}


def _asked_for(choice: str, name: str) -> WeightFormat:
    if choice == "int4" and name not in _TABLES:
        return WeightFormat.INT4
    return WeightFormat.INT8


def _nearest(model: Decoder, stored: Types) -> dict[str, WeightFormat | None]:
    """By parameter, which takes the most precise format that one of its parts needs."""
    parts: dict[str, list[WeightFormat | None]] = {}
    for name, kinds in stored.items():
        if not model.is_ignorable(name):
            parts.setdefault(parameter_of(name), []).extend(map(_nearest_to, kinds))
    return {name: _most_precise(formats) for name, formats in parts.items()}


def _nearest_to(kind: Kind) -> WeightFormat | None:
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    bits = 8 * block_bytes / block_values
    if bits >= _LEAST_BITS_OF_PLAIN:
        return None
    fits = bits <= _MOST_BITS_OF_INT4 and kind not in _UNEVEN
    return WeightFormat.INT4 if fits else WeightFormat.INT8


def _most_precise(formats: Iterable[WeightFormat | None]) -> WeightFormat | None:
    return max(formats, key=_BY_PRECISION.index)


def parameter_of(tensor: str) -> str:
    """The parameter that a text tensor is part of."""
    path, _, kind = tensor.rpartition(".")
    module, _, leaf = path.rpartition(".")
    return f"{module}.{_FUSED[leaf]}.{kind}" if leaf in _FUSED else tensor
