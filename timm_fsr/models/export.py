"""Exporting: a model as one file that torch, or onnxruntime, runs without timm and timm_fsr."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from timm_fsr.hooks.attach import check_sites
from timm_fsr.hooks.placement import pretrained_cfg_of
from timm_fsr.models.description import check_image_memory, check_runs, class_names, input_size
from timm_fsr.models.pixel import PixelModel, base_model
from timm_fsr.models.saving import weights_digest
from timm_fsr.utils.defaults import EXPORTS
from timm_fsr.utils.errors import UnsoundError, is_out_of_memory, unknown
from timm_fsr.utils.files import file_digest, staged
from timm_fsr.version import __version__

ABOUT = "timm_fsr.json"
"""Where a `.pt2` keeps what it knows of the model; an ONNX file has it as metadata of the same name."""

TOLERANCE = 1e-4
"""By how much of the largest logit an exported model may differ: onnxruntime adds in another order than torch."""

_FACTS = {"weights_sha256", "input_size", "torch"}  # those that every exported file has
_OWN_OPERATORS = ("aten", "prim", "prims")  # those that torch has without another package
_BATCHES = (1, 2, 5)  # of the check; the model is traced with 2
_ONNX_LIMIT = 2**31  # bytes that one file of protobuf can hold
_TRACES = ("stack_trace", "from_node", "source_fn_stack", "torch_fn")  # of a node: paths of this machine, or of no use


@dataclass(frozen=True)
class Exported:
    """A file that `export` wrote.

    Attributes:
        format: "pt2" or "onnx".
        path: of the file.
        sha256: of the file.
        difference: the largest difference between its logits and the model's, on random images.
    """

    format: str
    path: Path
    sha256: str
    difference: float


def export(
    model: nn.Module, folder: str | Path, formats: Sequence[str] = ("pt2",), *, size: int | None = None
) -> tuple[Exported, ...]:
    """Write `model.pt2` and `model.onnx`: functions from images (N, C, H, W) in [0, 1] to logits, for any N.

    The model's mean and std are inside, and its feature layers as they are in eval mode. torch alone runs the `.pt2`,
    and gradients flow through it to the images; onnxruntime alone runs the ONNX file, without gradients. Both know the
    classes, the image size and the SHA-256 of the weights, and name no path of this machine. They are read back and
    compared with the model before they take the place of older ones.

    Args:
        model: a timm model or a PixelModel of one, on any device; it is left as it is.
        folder: where the files are written, such as the one that `save_pretrained` wrote.
        formats: "pt2", "onnx" or both.
        size: side of the images; None: the model's own.

    Returns:
        The files, in the order of `formats`.

    Raises:
        ValueError: an unknown format, a model that does not say the size of its images, or one that cannot be exported;
            the message names the reason.
        ModuleNotFoundError: "onnx" needs packages that are not installed.
        UnsoundError: a conversion has replaced the module that a feature layer sits on.
        OSError: the files cannot be written; what was there before is untouched.
    """
    formats = check_formats(formats)
    check_sites(base_model(model))
    subject = _frozen_copy(model)
    shape = _image_size(subject, size)
    check_image_memory(subject, shape)
    check_runs(subject, shape)
    about = {**_facts(subject, shape), "weights_sha256": weights_digest(model)}
    with staged(Path(folder)) as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters' own making
        program = _program(subject, shape)
        differences = []
        for name in formats:
            _WRITERS[name](program, scratch / EXPORTS[name], about, subject)
            differences.append(_compare(scratch / EXPORTS[name], subject, shape))
    paths = [Path(folder) / EXPORTS[name] for name in formats]
    return tuple(map(Exported, formats, paths, map(file_digest, paths), differences))


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats, each once, if they are known and the packages that they need are here.

    Raises:
        ValueError, ModuleNotFoundError: see above.
    """
    if isinstance(formats, str):
        raise ValueError(f"formats={formats!r} is one format where a list belongs; use [{formats!r}]")
    if not formats:
        raise ValueError(f"there is no format to export to; name one or more of {', '.join(EXPORTS)}")
    for name in formats:
        if name not in EXPORTS:
            raise ValueError(unknown("format", str(name), list(EXPORTS)))
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if "onnx" in formats and missing:
        raise ModuleNotFoundError(
            f"the format onnx needs {' and '.join(missing)}, which this Python does not have; install it with "
            '`pip install "timm-fsr[onnx]"`, or export to pt2, which needs torch alone'
        )
    return tuple(dict.fromkeys(formats))


def exported_facts(name: str, content: bytes) -> Mapping[str, Any]:
    """What `export` wrote into a file about the model. Runs nothing in the file.

    Args:
        name: "model.pt2" or "model.onnx".
        content: of the file.

    Returns:
        "weights_sha256", "input_size" (channels, height and width), "torch" (its version), "classes" and others.

    Raises:
        ValueError: something else wrote it, or it is damaged.
        ModuleNotFoundError: it is an ONNX file, and what reads it is not installed.
    """
    kind = next(format for format, file in EXPORTS.items() if file == name)
    check_formats([kind])
    try:
        found = json.loads(_READERS[kind](content))
    except Exception as error:  # protobuf and zip have kinds of their own
        raise ValueError(f"{name} is damaged ({_reason(error)}); export the model again") from error
    if not (isinstance(found, dict) and found.keys() >= _FACTS and _is_size(found["input_size"])):
        raise ValueError(
            f"{name} was not written by timm_fsr; take it away, or replace it by `timm-fsr export --formats {kind}`"
        )
    return found


def _is_size(found: Any) -> bool:
    return isinstance(found, list) and len(found) == 3 and all(isinstance(side, int) for side in found)


def _read_pt2_facts(content: bytes) -> str:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if name.rpartition("/")[2] == ABOUT]
        return archive.read(names[0]).decode() if names else "{}"


def _read_onnx_facts(content: bytes) -> str:
    import onnx

    entries = onnx.load_model_from_string(content).metadata_props
    return next((str(entry.value) for entry in entries if entry.key == ABOUT), "{}")


_READERS: dict[str, Callable[[bytes], str]] = {"pt2": _read_pt2_facts, "onnx": _read_onnx_facts}


def exported_bytes(folder: Path, model: nn.Module, formats: Sequence[str] = ()) -> dict[str, bytes]:
    """The exported files of a saved model by name: those in its folder, and those of `formats` that are not there yet.

    Args:
        folder: of the saved model, which is only read.
        model: what `timm_fsr.models.saving.load` makes of it.
        formats: what is to be there.

    Raises:
        ValueError, ModuleNotFoundError: a file of the folder is not this model's, or see `export`.
    """
    there = [name for name, file in EXPORTS.items() if (folder / file).is_file()]
    wanted = check_formats([*there, *formats]) if there or formats else ()
    found = {EXPORTS[name]: (folder / EXPORTS[name]).read_bytes() for name in there}
    for name in there:
        check_exported(folder / EXPORTS[name], model)
    with tempfile.TemporaryDirectory() as scratch:
        if missing := [name for name in wanted if name not in there]:
            export(model, scratch, missing)
        found |= {EXPORTS[name]: (Path(scratch) / EXPORTS[name]).read_bytes() for name in missing}
    return found


def check_exported(path: Path, model: nn.Module) -> None:
    """Refuse an exported file that is not this model.

    Raises:
        ValueError: it was made from other weights, its logits differ, or see `exported_facts`.
    """
    facts = exported_facts(path.name, path.read_bytes())
    if facts["weights_sha256"] != weights_digest(model):
        raise ValueError(f"{path} was made from other weights; export this model again, or take the file away")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own making
        _compare(path, _frozen_copy(model), tuple(facts["input_size"]))


def _frozen_copy(model: nn.Module) -> PixelModel:
    """A copy of the model in pixel space: on the CPU, in float32 and eval mode, its weights frozen."""
    found: Any = copy.deepcopy(base_model(model)).cpu().float()
    if hasattr(found, "set_grad_checkpointing"):
        found.set_grad_checkpointing(False)
    return PixelModel(found).eval().requires_grad_(False)


def _image_size(subject: nn.Module, size: int | None) -> tuple[int, int, int]:
    known = input_size(subject)
    if size is not None and size < 1:
        raise ValueError(f"size={size} must be 1 or more: it is a side in pixels")
    if known is None and size is None:
        raise ValueError("the model does not say the size of its images; give the side of the square, such as size=224")
    channels = known[0] if known else getattr(base_model(subject), "in_chans", 3)
    if size is not None:
        return channels, size, size
    assert known is not None
    return known


def _facts(subject: nn.Module, shape: tuple[int, int, int]) -> dict[str, Any]:
    names = class_names(subject)
    return {
        "architecture": _architecture(subject),
        "images": "float32 (N, C, H, W), pixels in [0, 1]",
        "input_size": list(shape),
        **({"classes": list(names)} if names else {}),
        "timm_fsr": __version__,
        "torch": torch.__version__,
    }


def _architecture(subject: nn.Module) -> str:
    base = base_model(subject)
    return str(pretrained_cfg_of(base).get("architecture") or type(base).__name__)


def _program(subject: nn.Module, shape: tuple[int, int, int]) -> ExportedProgram:
    """The model as a graph of torch's own operators, for any number of images."""
    with torch.no_grad():
        program: ExportedProgram = _told(
            lambda: torch.export.export(
                subject, (torch.zeros(2, *shape),), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False
            ),
            subject,
            "pt2",
        )
    program._example_inputs = None  # images of zeros, in the file's way
    foreign = set()
    for graph in (part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)):
        for node in graph.nodes:
            for key in _TRACES:
                node.meta.pop(key, None)
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in _OWN_OPERATORS:
                foreign.add(str(node.target))
    if foreign:
        raise ValueError(
            f"{_architecture(subject)} cannot be exported: it uses {', '.join(sorted(foreign))}, which torch alone "
            "does not have, so that the file could not be run without the package that it comes from"
        )
    return program


def _write_pt2(program: ExportedProgram, path: Path, about: Mapping[str, Any], subject: nn.Module) -> None:
    files = {ABOUT: json.dumps(about)}
    _told(lambda: torch.export.save(program, path, extra_files=files), subject, "pt2")


def _write_onnx(program: ExportedProgram, path: Path, about: Mapping[str, Any], subject: nn.Module) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in subject.state_dict().values())
    if size >= _ONNX_LIMIT:
        raise ValueError(
            f"{_architecture(subject)} has {size / 1e9:.1f} GB of weights, and one ONNX file holds no more than 2 GB; "
            "export it to pt2"
        )
    made: Any = _told(
        lambda: torch.onnx.export(
            program,
            (torch.zeros(2, *about["input_size"]),),
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
        ),
        subject,
        "onnx",
    )
    made.model.metadata_props[ABOUT] = json.dumps(about)
    made.save(path, external_data=False)


_WRITERS: dict[str, Callable[[ExportedProgram, Path, Mapping[str, Any], nn.Module], None]] = {
    "pt2": _write_pt2,
    "onnx": _write_onnx,
}


def _told(action: Callable[[], Any], subject: nn.Module, name: str) -> Any:
    """What `action` returns; an exporter's error becomes one that says which model cannot be exported, and why."""
    try:
        return action()
    except UnsoundError:  # of a layer that would be left out
        raise
    except Exception as error:  # each part of the exporters has its own kinds
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{_architecture(subject)} cannot be exported to {name}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first line of the error that began it all, with its kind."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def _compare(path: Path, subject: nn.Module, shape: tuple[int, int, int]) -> float:
    """The largest difference between the logits of a file and of the model, on random images of several batch sizes.

    Raises:
        ValueError: it is more than rounding, or gradients to the images are others.
    """
    run = _run_pt2(path) if path.name == EXPORTS["pt2"] else _run_onnx(path)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for count in _BATCHES:
        images = torch.rand(count, *shape, generator=generator)
        expected = _logits(subject, images)
        if count == _BATCHES[0] and not torch.equal(expected, _logits(subject, images)):
            raise ValueError(
                f"{_architecture(subject)} cannot be exported: in eval mode it answers differently each time; make it "
                "deterministic there"
            )
        worst = max(worst, _checked(run(images), expected, "logits", path, subject))
    if path.name == EXPORTS["pt2"]:
        _checked(_gradient(run, images), _gradient(subject, images), "gradients to the images", path, subject)
    return worst


def _checked(found: Tensor, expected: Tensor, what: str, path: Path, subject: nn.Module) -> float:
    """The largest difference, which has to be one of rounding."""
    if found.shape != expected.shape:
        raise ValueError(
            f"{path.name} gives {what} of shape {tuple(found.shape)}, and {_architecture(subject)} of shape "
            f"{tuple(expected.shape)}; the model cannot be exported to it"
        )
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * scale:  # also true for NaN
        raise ValueError(
            f"{path.name} differs from {_architecture(subject)}: {what} by {difference:.3g} (their largest is "
            f"{scale:.3g}), which is more than rounding; the model cannot be exported to it"
        )
    return difference


def _logits(subject: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = subject(images)
    return found


def _gradient(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(run(images).logsumexp(dim=1).sum(), images)
    return found


def _run_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    run: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return run


def _run_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
