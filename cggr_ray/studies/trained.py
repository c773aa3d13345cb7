"""A trained model under study: its hidden matrices, what they read, and what replacing them costs on held-out text.

Shapes: a weight is (O, I), out by in; R rows of hidden states, N positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cggr_ray.codec import from_plain, nearest, read_json
from cggr_ray.data.batch import MicroBatch
from cggr_ray.data.dataset import READY, DataSpec, PreparedData, open_data
from cggr_ray.data.loader import micro_batches
from cggr_ray.data.packing import best_fit, cut, fill_row
from cggr_ray.evaluation.heldout import summed_nll
from cggr_ray.evaluation.reference import check_reference
from cggr_ray.models.adapter import Adapter
from cggr_ray.models.families import SUPPORTED
from cggr_ray.models.presets import ModelSpec, check_folder
from cggr_ray.studies.moments import Moments, MomentsOf, relative_errors

KINDS = ("q", "k", "v", "o", "gate", "up", "down")
# Whose input each kind reads: one Gram matrix serves all that read the same.
READS = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}
# GPT-2 keeps q, k and v in one matrix, and has no gate.
FAMILIES = tuple(name for name in SUPPORTED if name != "gpt2")


@dataclass(frozen=True)
class TrainedSettings:
    """What studies of a trained model share.

    `model` and `data`: folders that a race wrote, runs/TRIAL/model (with --save-model) and data. Calibration rows are
    the first of the training order, held-out rows the first of the packed validation documents, from every source in
    turn. `tokens`: rows of the timed products.
    """

    model: str
    data: str
    fractions: tuple[float, ...] = ()
    calibration_rows: int = 64
    heldout_rows: int = 64
    micro_rows: int = 8
    tokens: int = 4096
    rounds: int = 20

    def __post_init__(self) -> None:
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ValueError(f"fractions: {fraction}; accepted: numbers in (0, 1]")
        if not self.fractions:
            raise ValueError("fractions: none; accepted: at least one number in (0, 1]")
        for name in ("calibration_rows", "heldout_rows", "micro_rows", "tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; accepted: at least 1")
        check_folder(Path(self.model))
        family = ModelSpec(folder=self.model).config().model_type
        if family not in FAMILIES:
            raise ValueError(f"model family {family!r} in {self.model!r}; accepted: {', '.join(FAMILIES)}")
        if not (Path(self.data) / READY).is_file():
            raise ValueError(f"data folder {self.data!r} has no {READY}; accepted: the data folder of a race")


def check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError where there are no names, or one is not known."""
    if not names:
        raise ValueError(f"{what}: none; accepted: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"{what}: {name!r}; {nearest(name, known)}")


@dataclass(frozen=True)
class Replaced:
    """A row: what some matrices cost when others stand in for them. Columns are explained by `NOTES`."""

    method: str
    kind: str
    fraction: float
    weight_error: float
    output_error: float
    loss: float
    loss_change: float
    fit_seconds: float
    kept: int | None = None
    break_even: float | None = None
    ms_full: float | None = None
    ms: float | None = None
    flops_full: int | None = None
    flops: int | None = None

    def line(self) -> str:
        return f"{self.method} {self.kind} at {self.fraction:.3g}: loss {self.loss_change:+.4f} nats/token"


NOTES = (
    "weight_error: |W - W'|_F / |W|_F; output_error: |X (W - W')^T|_F / |X W^T|_F on held-out activations of the full "
    "model; pooled over all replaced matrices",
    "loss: held-out nats a token with the matrices of all layers replaced; loss_change: minus that of the full model",
    "ms_full, ms: median forward of one layer's matrices, measured; flops: of the same, a multiplication and addition "
    "are 2",
    "fit_seconds: finding the replacement, all layers and all fractions of the method together for closed forms",
)


@dataclass(frozen=True)
class Matrix:
    """A hidden matrix of a layer."""

    layer: int
    kind: str
    linear: nn.Linear

    @property
    def weight_OI(self) -> Tensor:
        """The parameter itself."""
        return self.linear.weight

    @property
    def reads(self) -> tuple[int, str]:
        return self.layer, READS[self.kind]


class Trained:
    """The model of a folder, with the rows of its race.

    Raises:
        ValueError: the model does not read the data's tokens, or the data's tokenizer is gone.
    """

    def __init__(self, settings: TrainedSettings, device: torch.device) -> None:
        data = open_prepared(Path(settings.data))
        check_reference(settings.model, data)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.adapter = Adapter(ModelSpec(folder=settings.model).build(None, 0, device, dtype))
        self.matrices = list(_matrices(self.adapter))
        learning = {id(matrix.weight_OI) for matrix in self.matrices}
        for parameter in self.adapter.model.parameters():
            parameter.requires_grad_(id(parameter) in learning)
        self.calibration = calibration_rows(data, settings.calibration_rows, settings.micro_rows, device)
        self.heldout = heldout_rows(data, settings.heldout_rows, settings.micro_rows, device)
        self.full_loss = self.heldout_loss()

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Nats a labelled position of the held-out rows, with the weights as they are now."""
        nats = sum(float(summed_nll(self.adapter, micro)) for micro in self.heldout)
        return nats / sum(micro.labelled for micro in self.heldout)

    @torch.no_grad()
    def moments(self, micros: Sequence[MicroBatch]) -> MomentsOf:
        """Of every input that the hidden matrices read; padding left out."""
        readers = [matrix for matrix in self.matrices if READS[matrix.kind] == matrix.kind]
        found = {matrix.reads: Moments.zeros(matrix.linear.in_features, self.adapter.device) for matrix in readers}
        for micro in micros:
            real_N = micro.position_ids_BT.flatten() >= 0
            hooks = [
                matrix.linear.register_forward_pre_hook(partial(_collect, found[matrix.reads], real_N))
                for matrix in readers
            ]
            try:
                # Compiled layers would not see the hooks.
                with torch.compiler.set_stance("force_eager"):
                    self.adapter.forward(micro)
            finally:
                for hook in hooks:
                    hook.remove()
        return found

    @contextmanager
    def replaced(self, matrices: Sequence[Matrix], weights: Sequence[Tensor]) -> Iterator[None]:
        """Inside, other weights stand in for some matrices, in the model's own precision."""
        kept = [matrix.weight_OI.detach().clone() for matrix in matrices]
        try:
            put(matrices, weights)
            yield
        finally:
            put(matrices, kept)

    def quality(self, heldout: MomentsOf, matrices: Sequence[Matrix], weights: Sequence[Tensor]) -> dict[str, Any]:
        """The columns of a row that say how well `weights` stand in for `matrices`."""
        triples = [(m.weight_OI.detach(), w, heldout[m.reads].gram_II) for m, w in zip(matrices, weights, strict=True)]
        weight_error, output_error = relative_errors(triples)
        with self.replaced(matrices, weights):
            loss = self.heldout_loss()
        return {
            "weight_error": weight_error,
            "output_error": output_error,
            "loss": loss,
            "loss_change": loss - self.full_loss,
        }

    def facts(self) -> dict[str, Any]:
        """What holds for every row."""
        labelled = (sum(micro.labelled for micro in micros) for micros in (self.calibration, self.heldout))
        calibration, heldout = labelled
        return {"full_loss": self.full_loss, "calibration_tokens": calibration, "heldout_tokens": heldout}


@torch.no_grad()
def put(matrices: Sequence[Matrix], weights: Sequence[Tensor]) -> None:
    for matrix, weight in zip(matrices, weights, strict=True):
        matrix.weight_OI.copy_(weight)


def open_prepared(folder: Path) -> PreparedData:
    """The prepared data of a race, by the specification in its own ready file."""
    return open_data(from_plain(DataSpec, read_json(folder / READY, "spec")["spec"], "data"), folder)


def calibration_rows(data: PreparedData, rows: int, micro_rows: int, device: torch.device) -> list[MicroBatch]:
    """The first rows of the training order, whole micro-batches of them."""
    order = data.order()
    return micro_batches(order.first_rows(-(-rows // micro_rows) * micro_rows), micro_rows, order.shape, device)


def heldout_rows(data: PreparedData, rows: int, micro_rows: int, device: torch.device) -> list[MicroBatch]:
    """Rows of the first held-out documents, as many from every source; short of documents, there are fewer."""
    spec, shape, packed = data.spec, data.order().shape, []
    each = -(-rows // len(data.val))
    for number, store in enumerate(data.val):
        cuts = (cut(store, number, d, spec.row_tokens, spec.mask_prompts) for d in range(store.documents))
        pieces, room = [], each * spec.row_tokens
        for piece in chain.from_iterable(cuts):
            if room <= 0:
                break
            pieces.append(piece)
            room -= piece.positions
        bins = best_fit([piece.positions for piece in pieces], shape.positions, shape.most_documents)[:each]
        packed += [fill_row([pieces[i] for i in chosen], data.val, shape) for chosen in bins]
    packed += [fill_row([], data.val, shape)] * (-len(packed) % micro_rows)
    return micro_batches(packed, micro_rows, shape, device)


def _matrices(adapter: Adapter) -> Iterator[Matrix]:
    for number, layer in enumerate(adapter.layers):
        linear = {id(module.weight): module for module in layer.modules() if isinstance(module, nn.Linear)}
        weights = adapter.family.weights(number)
        for kind in KINDS:
            yield Matrix(number, kind, linear[id(getattr(weights, kind))])


def _collect(moments: Moments, real_N: Tensor, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    moments.add(inputs[0].flatten(0, -2)[real_N])
