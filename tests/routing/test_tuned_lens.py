"""The tuned lens against a loop in float64 by autograd and AdamW's formula, and in real steps of a model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from small_batches import LENGTHS, hidden_after, lens_logits, packed, true_scores
from small_models import CONFIGS, small_model
from torch import Tensor

from cggr_ray.data.batch import MicroBatch
from cggr_ray.learner import Pass
from cggr_ray.models.adapter import Adapter, Stream
from cggr_ray.progress import Progress
from cggr_ray.recipe import Recipe
from cggr_ray.routing.scorers import Scorer, Setting, TruncatedRouter
from cggr_ray.routing.scores import SCORES
from cggr_ray.routing.tokens import SelectedTokens
from cggr_ray.routing.trained_scorers import TunedLens
from cggr_ray.schema import ROUTER_RECALL, ROUTER_SPEARMAN
from cggr_ray.sparse.plan import Seen

WIDTH, VOCABULARY, POSITIONS = 12, 96, 147
SETTING = Setting(torch.device("cpu"), num_layers=3, width=WIDTH, num_positions=POSITIONS)
MICRO = packed(LENGTHS, width=21)
LABELLED = (MICRO.labels_BT >= 0).flatten()
HEAD = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(7))


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def final_of(normed_ND: Tensor) -> Tensor:
    """What later layers make of it: another basis, and a shift."""
    return 0.7 * normed_ND @ noise(WIDTH, WIDTH, seed=20) / WIDTH**0.5 + normed_ND + noise(WIDTH, seed=21)


def slots(seed: int, count: int) -> Tensor:
    """Flat positions, labelled or not, sorted."""
    return torch.randperm(POSITIONS, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def scores_of(lens: Scorer, normed_ND: Tensor) -> Tensor:
    seen = Seen(torch.full_like(normed_ND, torch.nan), normed_ND, HEAD)
    return lens.score(seen, MICRO, torch.Generator()).scores_BT


def teach(lens: Scorer, normed_ND: Tensor, index_K: Tensor, kept_rows: bool, final_ND: Tensor | None = None) -> None:
    """One micro-batch, whose forward ends with all positions or with the kept ones alone."""
    final_ND = final_of(normed_ND) if final_ND is None else final_ND
    final, index = (final_ND[index_K], index_K) if kept_rows else (final_ND, None)
    scores_of(lens, normed_ND)
    lens.watch(Stream(final, HEAD, index), index_K)
    lens.learn(MICRO, index_K, torch.where(LABELLED[index_K], 1.0, 0.0))


class ByHand:
    """The same in float64."""

    def __init__(self, lr: float) -> None:
        self.lr, self.step = lr, 0
        self.parameters = [torch.zeros(s, dtype=torch.float64) for s in ((WIDTH, WIDTH), (WIDTH,))]
        self.means = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    def read(self, normed: Tensor, parameters: list[Tensor]) -> Tensor:
        turn, shift = parameters
        return normed + torch.einsum("ij,nj->ni", turn, normed) / WIDTH + shift / math.sqrt(WIDTH)

    def teach(self, normed: Tensor, index: list[int]) -> None:
        leaves = [p.clone().requires_grad_() for p in self.parameters]
        divergence = torch.zeros((), dtype=torch.float64)
        for i in index:
            own = (HEAD.double() @ final_of(normed.float())[i].double()).softmax(0)
            read = (HEAD.double() @ self.read(normed[i : i + 1], leaves)[0]).log_softmax(0)
            divergence = divergence + (own * (own.log() - read)).sum() / len(index)
        self.step += 1
        for i, grad in enumerate(torch.autograd.grad(divergence, leaves)):
            first, second = self.means[i]
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad.square()
            self.means[i] = first, second
            root = (second / (1 - 0.999**self.step)).sqrt() + 1e-8
            self.parameters[i] = self.parameters[i] - self.lr * first / (1 - 0.9**self.step) / root


@pytest.mark.parametrize("kept_rows", [True, False])
def test_it_learns_as_the_loop_by_hand_does(kept_rows: bool) -> None:
    lens, by_hand = TunedLens(1, lr=0.1).build("loss", SETTING, seed=0), ByHand(0.1)
    for seed in range(6):
        normed, index = noise(POSITIONS, WIDTH, seed=seed), slots(seed, 60)
        teach(lens, normed, index, kept_rows)
        by_hand.teach(normed.double(), [i for i in index.tolist() if LABELLED[i]])
    found = lens.tensors()
    for name, expected in zip(("map", "bias"), by_hand.parameters, strict=True):
        assert expected.abs().mean() > 0.02
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-5, msg=name)
    normed = noise(POSITIONS, WIDTH, seed=99)
    logits = by_hand.read(normed.double(), by_hand.parameters) @ HEAD.double().T
    expected = true_scores(logits.view(*MICRO.labels_BT.shape, -1), MICRO.labels_BT)["loss"]
    torch.testing.assert_close(scores_of(lens, normed).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("most, count", [(20, 60), (60, 60), (500, 60), (7, 61), (1, 9)])
def test_it_learns_from_evenly_spread_positions_at_most_so_many(most: int, count: int) -> None:
    normed, index = noise(POSITIONS, WIDTH, seed=1), slots(1, count)
    few, all_of_few = (TunedLens(1, positions=n).build("loss", SETTING, seed=0) for n in (most, 10**6))
    chosen = [index[i * count // min(most, count)] for i in range(min(most, count))]
    teach(few, normed, index, kept_rows=True)
    teach(all_of_few, normed, torch.stack(chosen), kept_rows=True)
    assert len(set(map(int, chosen))) == min(most, count)
    for name, tensor in few.tensors().items():
        assert torch.equal(tensor, all_of_few.tensors()[name]), name


def test_what_has_no_label_or_is_no_number_teaches_nothing() -> None:
    labelled, unlabelled = LABELLED.nonzero().flatten(), (~LABELLED).nonzero().flatten()
    few, spoilt = labelled[:40], labelled[50:53]
    lenses = [TunedLens(1).build("loss", SETTING, seed=0) for _ in range(2)]
    for seed in range(4):
        normed = noise(POSITIONS, WIDTH, seed=seed)
        normed[spoilt] = torch.nan
        final = final_of(normed)
        for lens, index in zip(lenses, (few, torch.cat([few, unlabelled, few[-1:], spoilt])), strict=True):
            scores_of(lens, normed)
            lens.watch(Stream(final, HEAD), index)
            # An empty slot repeats a position; its loss, and one of what is no number, are none.
            nll = torch.cat([torch.ones(40), torch.zeros(len(unlabelled)), torch.full((4,), torch.nan)])
            lens.learn(MICRO, index, nll[: len(index)])
    for name, tensor in lenses[0].tensors().items():
        torch.testing.assert_close(lenses[1].tensors()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert all(tensor.any() for tensor in lenses[0].tensors().values())


@pytest.mark.parametrize("name", ["entropy", "margin", "loss", "gnorm"])
def test_it_learns_to_score_as_the_model_does(name: Any) -> None:
    """On hidden states that were not trained on."""
    lens = TunedLens(1).build(name, SETTING, seed=0)
    normed = noise(POSITIONS, WIDTH, seed=10**6)
    logits = (final_of(normed).double() @ HEAD.double().T).view(*MICRO.labels_BT.shape, -1)
    own = true_scores(logits, MICRO.labels_BT)[name]

    def agreement() -> float:
        return float(spearmanr(scores_of(lens, normed).flatten()[LABELLED], own.flatten()[LABELLED]).statistic)

    before = agreement()
    for seed in range(600):
        teach(lens, noise(POSITIONS, WIDTH, seed=seed), slots(seed, 60), kept_rows=True)
    assert before < 0.85 and agreement() > 0.98


# In a model


@pytest.mark.parametrize("family", CONFIGS)
def test_it_begins_as_the_truncated_router(family: str) -> None:
    adapter = Adapter(small_model(family))
    setting = Setting(adapter.device, 3, adapter.head_VD.shape[1], POSITIONS)
    hidden = hidden_after(adapter.model, MICRO, 2).flatten(0, 1)
    with torch.no_grad():
        seen = Seen(hidden, adapter.final_norm(hidden), adapter.head_VD.detach())
    for name in SCORES:
        lens, plain = (part(2).build(name, setting, seed=0) for part in (TunedLens, TruncatedRouter))
        found, expected = (one.score(seen, MICRO, torch.Generator()) for one in (lens, plain))
        assert lens.reads == plain.reads == 2
        assert torch.equal(found.scores_BT, expected.scores_BT)
        # What logs and a dynamic threshold read.
        assert found.stats is not None


def pass_of(plan: Any, router: Any, **options: Any) -> Pass:
    tokens = SelectedTokens(0.4, options.pop("score", "entropy"), plan=plan, router=router)
    return Pass(Recipe("x", tokens=tokens, **options), Adapter(small_model("llama")), 0, POSITIONS)


def run(one: Pass, ratio: float, micro: MicroBatch = MICRO, compare: bool = False, step: int = 0) -> dict[str, Tensor]:
    one.router.begin(micro, Progress(step, 50.0, 100.0, 10**6))
    return one(micro, torch.tensor(1 / micro.labelled), ratio, compare)[1]


def divergence(one: Pass, micro: MicroBatch) -> float:
    """Mean KL of the model from its lens behind the first layer, over labelled positions; Hugging Face's forward."""
    turn, shift = (one.router.tensors()[name].double() for name in ("map", "bias"))
    model = one.adapter.model
    with torch.no_grad():
        normed = model.model.norm(hidden_after(model, micro, 1)).double()
    read = (
        normed + normed @ turn.T / len(shift) + shift / math.sqrt(len(shift))
    ) @ model.get_output_embeddings().weight.double().T
    own = lens_logits(model, micro, 3)
    found = F.kl_div(read.log_softmax(-1), own.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return found[micro.labels_BT >= 0].mean().item()


@pytest.mark.parametrize("ratio", [0.4, 1.0])
@pytest.mark.parametrize("plan", ["before", "dense"])
def test_steps_bring_it_to_the_model(plan: str, ratio: float) -> None:
    """Full ones too; also on a micro-batch that it has not seen."""
    one, other = pass_of(plan, TunedLens(1)), packed(LENGTHS, width=21, seed=1000)
    first, first_other = divergence(one, MICRO), divergence(one, other)
    for seed in range(100):
        run(one, ratio, packed(LENGTHS, width=21, seed=seed), step=seed)
    assert divergence(one, MICRO) < 0.7 * first and divergence(one, other) < 0.7 * first_other


@pytest.mark.parametrize("plan", ["before", "dense"])
def test_it_teaches_the_model_nothing(plan: str) -> None:
    """The first step, in which it chooses as a truncated router does, has that router's gradients."""
    gradients = []
    for router in (TunedLens(1), TruncatedRouter(1)):
        one = pass_of(plan, router)
        run(one, 0.4)
        gradients.append({name: p.grad for name, p in one.adapter.named_parameters()})
    for name, grad in gradients[0].items():
        assert grad is not None and torch.equal(grad, gradients[1][name]), name


def test_its_agreement_with_the_model_rises() -> None:
    one = pass_of("before", TunedLens(1), score="loss")
    before = run(one, 0.4, compare=True)
    for seed in range(100):
        run(one, 0.4, packed(LENGTHS, width=21, seed=seed), step=seed)
    after = run(one, 0.4, compare=True)
    for name in (ROUTER_SPEARMAN, ROUTER_RECALL):
        assert after[name] > before[name] + 0.05 and math.isfinite(after[name])
