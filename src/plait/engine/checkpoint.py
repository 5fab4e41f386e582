"""A checkpoint folder as Hugging Face lays it out, opened without reading a tensor.

`config.json`, maybe `generation_config.json`, and weights in `model.safetensors` or in shards listed by
`model.safetensors.index.json`. Only the headers of the weight files are read here: names, dtypes, shapes and places.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import cast

from plait.errors import BadSetup
from plait.model import ModelSpec, TensorPlan, head_prefix, name_prefix, names_of, plan_tensors, read_spec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
}
_FLOATS = ("F32", "F16", "BF16", "F64")
_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# A header is JSON of names and shapes: 100 MB is the limit that the safetensors library sets.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a weight file; `offset_bytes` counts from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """An opened checkpoint; `dtype` is the type that the config (or else the weights) say the model is kept in."""

    folder: Path
    spec: ModelSpec
    eos_token_ids: tuple[int, ...]
    dtype: str
    tensors: Mapping[str, StoredTensor]
    fingerprint: str
    """Stable for the same files: of the config, and of names, shapes, places and file sizes of the weights."""

    def plan(self, blocks: range | None = None) -> TensorPlan:
        """What the span needs, checked against the files: every tensor there, of the right shape, and none left over.

        Raises:
            BadSetup: the first tensor that does not fit, with its file and what was expected.
        """
        spec = self.spec
        names = names_of(spec)
        whole = plan_tensors(spec, names, spec.all_blocks, self.tensors)
        for planned in whole.tensors:
            for name, shape in planned.stored():
                self._check_stored(name, shape, ("U8",) if planned.scales else _FLOATS)
        self._check_all_used(whole)
        return whole if blocks is None else plan_tensors(spec, names, blocks, self.tensors)

    def _check_stored(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        config_file, stored = self.folder / "config.json", self.tensors.get(name)
        if stored is None:
            raise BadSetup(
                f"{self._weights_name()}: tensor {name!r} of shape {list(shape)} is missing; {config_file} asks for "
                f"it ({_nearest(name, self.tensors)})"
            )
        if stored.shape != shape:
            raise BadSetup(
                f"{stored.file}: tensor {name!r} has shape {list(stored.shape)}, and {config_file} asks for "
                f"{list(shape)}"
            )
        if stored.dtype not in dtypes:
            raise BadSetup(
                f"{stored.file}: tensor {name!r} is {stored.dtype}; plait reads float32, bfloat16 and float16, and "
                "gpt-oss's MXFP4"
            )

    def weight_bytes(self, dtype: str, blocks: range | None = None) -> int:
        """Memory that the span's weights take once they are loaded in `dtype`."""
        total = 0
        for slot in self.plan(blocks).slots.values():
            elements = 1
            for size in slot.shape:
                elements *= size
            total += elements * (4 if slot.in_float32 else _DTYPE_BYTES[dtype])
        return total

    def _check_all_used(self, plan: TensorPlan) -> None:
        """Refuse weights that nothing reads: they mean that the model is not what its config says."""
        names = names_of(self.spec)
        prefix, blocks = name_prefix(names, self.tensors), len(self.spec.blocks)
        used = {name for planned in plan.tensors for name, _ in planned.stored()}
        head = head_prefix(names, self.tensors) + names.head.parts[0]
        block_number = re.compile(re.escape(prefix + names.block_prefix).replace(r"\{block\}", r"(\d+)"))
        for name, stored in self.tensors.items():
            if name in used or any(re.search(pattern, name) for pattern in names.ignored):
                continue
            if self.spec.tied_head and name == head + ".weight":
                continue  # some tools save the tied head a second time
            numbered = block_number.match(name)
            if names.skips_further_blocks and numbered and int(numbered[1]) >= blocks:
                continue
            if prefix and not name.startswith((prefix, head)) and _is_of_another_modality(name):
                continue
            raise BadSetup(
                f"{stored.file}: nothing reads tensor {name!r} of shape {list(stored.shape)}; the weights are not "
                f"those of a {self.spec.family!r} model as {self.folder / 'config.json'} describes it"
            )

    def _weights_name(self) -> Path:
        single = self.folder / SINGLE_FILE
        return single if single.exists() else self.folder / INDEX_FILE


def _is_of_another_modality(name: str) -> bool:
    return re.search(r"(^|\.)(vision|multi_modal|visual|audio|mm_)", name) is not None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's description and the headers of its weight files.

    Raises:
        BadSetup: a file is missing, truncated or not what it should be, or the model is not one that plait implements.
    """
    if not folder.is_dir():
        raise BadSetup(f"{folder} is not a folder; name a folder with config.json and safetensors weights")
    config_file = folder / "config.json"
    config = _read_json(config_file, "every checkpoint has one")
    quantization = _mapping(config, "quantization_config")
    if quantization and quantization.get("quant_method") != "mxfp4":
        method = quantization.get("quant_method", "no method named")
        raise BadSetup(
            f"{config_file}: the weights are quantised ({method!r}); plait reads float32, bfloat16 and "
            "float16, so take an unquantised version of the model"
        )
    spec = read_spec(config, str(config_file))
    files = _weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        for tensor in _read_header(file):
            tensors[tensor.name] = tensor
            digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape} {tensor.offset_bytes}\n".encode())
    _check_index(folder, tensors)
    return Checkpoint(
        folder=folder,
        spec=spec,
        eos_token_ids=_eos_token_ids(folder, config),
        dtype=_dtype(config, tensors),
        tensors=tensors,
        fingerprint=digest.hexdigest()[:32],
    )


def _read_json(file: Path, why: str) -> Mapping[str, object]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadSetup(f"{file} is missing; {why}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadSetup(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadSetup(f"{file} must hold a JSON object, not {type(value).__name__}")
    return cast(Mapping[str, object], value)


def _mapping(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = config.get(key)
    return cast(Mapping[str, object], value) if isinstance(value, Mapping) else {}


def _weight_files(folder: Path) -> Sequence[Path]:
    if (folder / SINGLE_FILE).exists():
        return (folder / SINGLE_FILE,)
    if (folder / INDEX_FILE).exists():
        weight_map = _weight_map(folder)
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if file.parent != folder or not file.exists():
                raise BadSetup(
                    f"{file} is missing; {folder / INDEX_FILE} lists it, so download it or repair the index"
                )
        return files
    others = sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern)
    )
    if others:
        raise BadSetup(
            f"{folder} has {others[0]} but no {SINGLE_FILE}; plait never opens pickles, so convert the weights to "
            "safetensors (`save_pretrained` of transformers does)"
        )
    raise BadSetup(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; every checkpoint has one of them")


def _weight_map(folder: Path) -> Mapping[str, str]:
    index = _read_json(folder / INDEX_FILE, "the shards are listed in it")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadSetup(f"{folder / INDEX_FILE} has no 'weight_map' of tensor names to files")
    entries = cast(dict[str, object], weight_map)
    if not all(isinstance(name, str) for name in entries.values()):
        raise BadSetup(f"{folder / INDEX_FILE}: 'weight_map' must map tensor names to file names")
    return cast(Mapping[str, str], entries)


def _check_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    if (folder / SINGLE_FILE).exists():
        return
    for name, file in _weight_map(folder).items():
        if name not in tensors or tensors[name].file.name != file:
            raise BadSetup(
                f"{folder / file}: tensor {name!r} is missing; {folder / INDEX_FILE} says that it is there"
            )


def _read_header(file: Path) -> Sequence[StoredTensor]:
    """Names, dtypes, shapes and places: 8 bytes of length, that much JSON, then the data (safetensors' format)."""
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size_bytes < 8 or header_bytes > min(size_bytes - 8, _MAX_HEADER_BYTES):
            raise BadSetup(f"{file} is truncated or not a safetensors file; download it again")
        try:
            header = cast(dict[str, object], json.loads(stream.read(header_bytes)))
            return [
                _stored_tensor(file, name, cast(Mapping[str, object], entry), 8 + header_bytes, size_bytes)
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadSetup(
                f"{file}: the header is not that of a safetensors file ({error}); download it again"
            ) from None


def _stored_tensor(
    file: Path, name: str, entry: Mapping[str, object], data_start_bytes: int, file_bytes: int
) -> StoredTensor:
    shape = tuple(int(size) for size in cast(list[int], entry["shape"]))
    start, stop = (int(offset) for offset in cast(list[int], entry["data_offsets"]))
    dtype = str(entry["dtype"])
    expected_bytes = _ITEM_BYTES.get(dtype, 1)
    for size in shape:
        expected_bytes *= size
    if start < 0 or (dtype in _ITEM_BYTES and stop - start != expected_bytes):
        raise BadSetup(
            f"{file}: tensor {name!r} of shape {list(shape)} and type {dtype} takes {stop - start} bytes instead of "
            f"{expected_bytes}; download the file again"
        )
    if data_start_bytes + stop > file_bytes:
        raise BadSetup(
            f"{file} is truncated: tensor {name!r} ends at byte {data_start_bytes + stop} and the file at byte "
            f"{file_bytes}; download it again"
        )
    return StoredTensor(
        name=name,
        file=file,
        dtype=dtype,
        shape=shape,
        offset_bytes=data_start_bytes + start,
        size_bytes=stop - start,
    )


def _eos_token_ids(folder: Path, config: Mapping[str, object]) -> tuple[int, ...]:
    """End-of-sequence ids: those of generation_config.json, or else of the config; either may be one id or a list."""
    sources = [_mapping(config, "text_config"), config]
    if (folder / "generation_config.json").exists():
        sources.insert(0, _read_json(folder / "generation_config.json", ""))
    for source in sources:
        value = source.get("eos_token_id")
        if value is None:
            continue
        ids = cast(list[object], value) if isinstance(value, list) else [value]
        if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids):
            raise BadSetup(f"{folder}: 'eos_token_id' must be a token id or a list of them, not {value!r}")
        return tuple(cast(list[int], ids))
    return ()


def _dtype(config: Mapping[str, object], tensors: Mapping[str, StoredTensor]) -> str:
    for source in (config, _mapping(config, "text_config")):
        for key in ("dtype", "torch_dtype"):
            value = source.get(key)
            if isinstance(value, str) and value.removeprefix("torch.") in _DTYPE_BYTES:
                return value.removeprefix("torch.")
    by_code = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
    return next((by_code[t.dtype] for t in tensors.values() if t.dtype in by_code), "float32")


def _nearest(name: str, tensors: Mapping[str, StoredTensor]) -> str:
    """The stored name that shares most with the missing one, for the message."""
    if not tensors:
        return "the files hold no tensor at all"
    (best,) = get_close_matches(name, tensors, n=1, cutoff=0.0)
    return f"the nearest that is there is {best!r}"
