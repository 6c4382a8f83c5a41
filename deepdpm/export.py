"""A trained assigner for other programs: ONNX, or safetensors, each with a card that says what it holds.

Both map raw points to the probabilities of the clusters: the transform, then the cluster net.

Legend: N points, D dimensions, K clusters.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deepdpm.predict import load_model
from deepdpm.results import versions, write_atomically

if TYPE_CHECKING:
    from deepdpm.module import DeepDPMModule

_MISSING = "needs further packages: pip install 'deepdpm[export]'."


class Assigner(nn.Module):
    """From raw points (N, D) to the probabilities of their clusters (N, K)."""

    def __init__(self, module: DeepDPMModule) -> None:
        super().__init__()
        if module.model.features.kind != "none":
            raise ValueError(
                "A model that learns features cannot be exported yet: export one of given codes."
            )
        self.transform, self.cluster_net = module.transform, module.cluster_net

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.cluster_net.log_prob(self.transform(x_ND)).exp()


def export(module: DeepDPMModule, path: Path) -> Path:
    """Write `path` (.onnx or .safetensors), and beside it a card: the same name with .json added.

    The card names the inputs, K, the stable ids, and for safetensors how the tensors are to be used.

    Raises:
        ValueError: another ending, packages that are missing, or a model that learns features.
    """
    writers = {".onnx": _write_onnx, ".safetensors": _write_safetensors}
    if path.suffix not in writers:
        raise ValueError(f"{path} is of no known kind: let it end in {' or '.join(writers)}.")
    assigner = Assigner(module).cpu().eval()
    writers[path.suffix](assigner, module, path)
    text = json.dumps(card(module), indent=2) + "\n"
    write_atomically(card_path(path), lambda file: file.write(text.encode()))
    return path


def card_path(path: Path) -> Path:
    """Where the card of an export lies, so that two formats of one name keep a card each.

    >>> card_path(Path("digits.onnx")).name
    'digits.onnx.json'
    """
    return path.with_name(path.name + ".json")


def card(module: DeepDPMModule) -> dict[str, Any]:
    """What a reader of an exported model needs to know, as plain values."""
    transform = module.transform
    places = [place for place, layer in enumerate(module.cluster_net.hidden) if isinstance(layer, nn.Linear)]
    return {
        "format": "deepdpm assigner 1",
        "input": {"name": "points", "dtype": "float32", "shape": ["N", module.num_dims]},
        "output": {"name": "probabilities", "dtype": "float32", "shape": ["N", module.num_clusters]},
        "num_clusters": module.num_clusters,
        "cluster_ids": module.cluster_ids_K.tolist(),
        "transform": transform.kind,
        "hidden": list(module.model.hidden),
        "temperature": module.model.temperature,
        "tensors": {name: list(value.shape) for name, value in tensors_of(module).items()},
        "formula": [
            "y = (points - transform.shift_D) * transform.scale_D in float64 "
            "(not for the transforms none and normalize)",
            "y = y @ transform.axes_DE (principal only)",
            "y = y / norm(y) (normalize and standard_normalize)",
            "for each of the layers (weight, bias) but the last: y = relu(y @ weight.T + bias)",
            "with the last: probabilities = softmax((y @ weight.T + bias) / temperature)",
        ],
        "layers": [
            *([f"cluster_net.hidden.{place}.weight", f"cluster_net.hidden.{place}.bias"] for place in places),
            ["cluster_net.output_weight", "cluster_net.output_bias"],
        ],
        "versions": versions(),
    }


def tensors_of(module: DeepDPMModule) -> dict[str, Tensor]:
    """The tensors of transform and cluster net, on the CPU, by name."""
    state = {f"transform.{name}": value for name, value in module.transform.state_dict().items()}
    state |= {f"cluster_net.{name}": value for name, value in module.cluster_net.state_dict().items()}
    return {
        name: value.detach().cpu().contiguous() for name, value in state.items() if isinstance(value, Tensor)
    }


def _write_safetensors(assigner: Assigner, module: DeepDPMModule, path: Path) -> None:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ValueError(f"The export to {path} {_MISSING}") from error
    content = save(tensors_of(module), metadata={"format": "deepdpm assigner 1"})
    write_atomically(path, lambda file: file.write(content))


def _write_onnx(assigner: Assigner, module: DeepDPMModule, path: Path) -> None:
    example_ND = torch.zeros(2, int(module.num_dims or 1))
    try:
        import onnx  # noqa: F401

        with warnings.catch_warnings():
            # The exporter through TorchScript needs no package beyond onnx, and says that a newer one exists.
            warnings.simplefilter("ignore")
            write_atomically(
                path,
                lambda file: torch.onnx.export(
                    assigner,
                    (example_ND,),
                    file,  # type: ignore[arg-type]  # an open file will do
                    input_names=["points"],
                    output_names=["probabilities"],
                    dynamic_axes={"points": {0: "N"}, "probabilities": {0: "N"}},
                    opset_version=17,
                    dynamo=False,
                ),
            )
    except ImportError as error:
        raise ValueError(f"The export to {path} {_MISSING}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a mistake of the user ends it with one sentence and status 1."""
    parser = argparse.ArgumentParser(
        prog="deepdpm-export",
        description="Export the assigner of a trained model to ONNX or safetensors, with a JSON card.",
        epilog="Example: deepdpm-export outputs/digits/RUN/model.ckpt digits.onnx",
    )
    parser.add_argument("model", type=Path, help="the model.ckpt of a run, or what DeepDPM.save wrote")
    parser.add_argument("out", type=Path, help="where to: .onnx or .safetensors")
    options = parser.parse_args(arguments)
    try:
        export(load_model(options.model), options.out)
    except ValueError as error:
        print(f"deepdpm-export: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"exported: {options.out} and {card_path(options.out)}")


if __name__ == "__main__":
    main()
