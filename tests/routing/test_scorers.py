"""Scorers against a logit lens by Hugging Face, a probe on a task it can learn, and a table of losses kept by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr
from small_batches import LENGTHS, VOCABULARY, lens_logits, packed, true_scores
from small_models import CONFIGS, small_model
from torch import Tensor

from cggr_ray.data.batch import MicroBatch
from cggr_ray.learner import Pass
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress
from cggr_ray.recipe import Recipe
from cggr_ray.routing.curriculum import Curriculum
from cggr_ray.routing.scorers import OwnScores, Scorer, Setting, StaleScores, TruncatedRouter
from cggr_ray.routing.scores import SCORES
from cggr_ray.routing.tokens import SelectedTokens
from cggr_ray.routing.trained_scorers import Probe
from cggr_ray.sparse.plan import Dense, KeptRows, Seen

CPU = torch.device("cpu")
WIDTH, POSITIONS = 16, 147
SETTING = Setting(CPU, num_layers=3, width=WIDTH, num_positions=POSITIONS)
MICRO = packed(LENGTHS, width=21)


# Scores through the head


def scores_of(scorer: Scorer, seen: Seen | None, micro: MicroBatch = MICRO) -> Tensor:
    return scorer.score(seen, micro, torch.Generator()).scores_BT


class StopError(Exception):
    pass


def scores_by(plan: str, scorer: Scorer, adapter: Adapter, micro: MicroBatch) -> Tensor:
    """What a scorer makes of what a plan shows it."""
    found = []

    def decide(seen: Seen | None) -> None:
        found.append(scores_of(scorer, seen, micro))
        raise StopError

    running = Dense(adapter) if plan == "dense" else KeptRows(adapter, "const")
    with pytest.raises(StopError):
        running.forward(micro, scorer.reads, decide)
    return found[0]


@pytest.mark.parametrize("plan", ["dense", "kept rows"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_those_of_a_logit_lens(family: str, layers: int, plan: str) -> None:
    model = small_model(family)
    expected = true_scores(lens_logits(model, MICRO, layers), MICRO.labels_BT)
    adapter = Adapter(model)
    for name in SCORES:
        config = OwnScores() if layers == 3 else TruncatedRouter(layers)
        scorer = config.build(name, SETTING, seed=0)
        found = scores_by(plan, scorer, adapter, MICRO)
        assert scorer.reads == layers and not found.requires_grad and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected[name], rtol=2e-4, atol=2e-4)


def test_lenses_of_different_depth_differ() -> None:
    model = small_model("llama")
    one, two, three = (true_scores(lens_logits(model, MICRO, k), MICRO.labels_BT)["loss"] for k in (1, 2, 3))
    labelled = MICRO.labels_BT >= 0
    assert (one - two)[labelled].abs().mean() > 0.1 and (two - three)[labelled].abs().mean() > 0.1


# The probe


def hidden_of(micro: MicroBatch, seed: int) -> Tensor:
    """Hidden states of uneven scale, as those of early layers are."""
    g = torch.Generator().manual_seed(seed)
    n = micro.labels_BT.numel()
    return torch.randn(n, WIDTH, generator=g) * (0.2 + 5 * torch.rand(n, 1, generator=g))


def task_loss(hidden_ND: Tensor) -> Tensor:
    """Losses around 7 with a spread of a tenth, a curved function of the direction of a hidden state."""
    g = torch.Generator().manual_seed(99)
    first, second = torch.randn(2, WIDTH, generator=g) / math.sqrt(WIDTH)
    x = hidden_ND / hidden_ND.square().mean(-1, keepdim=True).sqrt()
    return 7 + 0.1 * torch.tanh(x @ first + 0.5 * (x @ second).abs())


def seen_of(hidden_ND: Tensor) -> Seen:
    return Seen(hidden_ND, torch.full_like(hidden_ND, torch.nan), torch.full((VOCABULARY, WIDTH), torch.nan))


def slots(micro: MicroBatch, seed: int) -> Tensor:
    """A third of the flat positions, labelled or not, sorted."""
    n = micro.labels_BT.numel()
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 3].sort().values


def teach(probe: Scorer, steps: range) -> None:
    labelled = (MICRO.labels_BT >= 0).flatten()
    for seed in steps:
        hidden, index = hidden_of(MICRO, seed), slots(MICRO, seed)
        scores_of(probe, seen_of(hidden))
        probe.learn(MICRO, index, torch.where(labelled, task_loss(hidden), 0.0)[index])


def agreement_with_truth(probe: Scorer) -> float:
    """Rank correlation on hidden states that were not trained on."""
    hidden, labelled = hidden_of(MICRO, 10**6), (MICRO.labels_BT >= 0).flatten()
    found = scores_of(probe, seen_of(hidden)).flatten()
    return float(spearmanr(found[labelled], task_loss(hidden)[labelled]).statistic)


def test_a_probe_learns_to_rank_losses() -> None:
    probe = Probe(layers=1).build("loss", SETTING, seed=3)
    assert abs(agreement_with_truth(probe)) < 0.5
    teach(probe, range(500))
    assert agreement_with_truth(probe) > 0.9


def test_a_probe_follows_adamw_on_the_standardised_loss_by_hand() -> None:
    """In float64: mean and second moment of the loss are averages that keep .99, begun with the first micro-batch."""
    probe = Probe(layers=1, hidden=8, lr=0.01).build("loss", SETTING, seed=3)
    into, bias, out = (torch.nn.Parameter(probe.tensors()[name].double()) for name in ("into", "bias", "out"))
    optimizer = torch.optim.AdamW([into, bias, out], lr=0.01, weight_decay=0.0)
    labelled, moments = (MICRO.labels_BT >= 0).flatten(), torch.zeros(2, dtype=torch.float64)

    def predicted(hidden_RD: Tensor) -> Tensor:
        x = hidden_RD.double()
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return (torch.relu(x @ into.mT + bias) @ out.mT).squeeze(-1)

    for step in range(6):
        hidden, index = hidden_of(MICRO, step), slots(MICRO, step)
        # Losses of another size in every micro-batch.
        losses = task_loss(hidden) * (1 + step)
        found = scores_of(probe, seen_of(hidden)).flatten()[labelled]
        torch.testing.assert_close(found.double(), predicted(hidden).detach()[labelled], rtol=1e-3, atol=1e-4)
        probe.learn(MICRO, index, torch.where(labelled, losses, 0.0)[index])
        index = index[labelled[index]]
        nll = losses[index].double()
        seen = torch.stack((nll.mean(), nll.square().mean()))
        moments = seen if step == 0 else 0.99 * moments + 0.01 * seen
        target = (nll - moments[0]) / (moments[1] - moments[0].square()).sqrt()
        optimizer.zero_grad()
        (predicted(hidden[index]) - target).square().mean().backward()
        optimizer.step()


def test_probes_of_one_seed_are_equal() -> None:
    found = [Probe(layers=1).build("loss", SETTING, seed).tensors()["into"] for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_probe_goes_on_where_its_tensors_were_saved() -> None:
    straight = Probe(layers=1).build("loss", SETTING, seed=3)
    teach(straight, range(20))
    saved = {name: tensor.clone() for name, tensor in straight.tensors().items()}
    resumed = Probe(layers=1).build("loss", SETTING, seed=4)
    teach(resumed, range(50, 53))
    for name, tensor in resumed.tensors().items():
        tensor.copy_(saved.pop(name))
    assert not saved
    seen = seen_of(hidden_of(MICRO, 7))
    assert torch.equal(scores_of(straight, seen), scores_of(resumed, seen))
    for probe in (straight, resumed):
        teach(probe, range(20, 30))
    assert torch.equal(scores_of(straight, seen), scores_of(resumed, seen))
    for name, tensor in straight.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


@pytest.mark.parametrize("config", [Probe(layers=1), StaleScores()])
def test_positions_without_a_label_score_nothing(config: Probe | StaleScores) -> None:
    # Token 0 is a label as any other.
    micro = replace(MICRO, labels_BT=MICRO.labels_BT.clamp_max(0))
    found = config.build("loss", SETTING, seed=0).score(seen_of(hidden_of(micro, 0)), micro, torch.Generator())
    assert torch.equal(found.scores_BT == -torch.inf, micro.labels_BT < 0)
    assert found.scores_BT[micro.labels_BT == 0].isfinite().all() and found.stats is None


def test_unlabelled_and_empty_slots_teach_a_probe_nothing() -> None:
    """Neither does a loss that is not a number, even if the hidden states are none either."""
    labelled = (MICRO.labels_BT >= 0).flatten()
    few = labelled.nonzero().flatten()[:40]
    unlabelled = (~labelled).nonzero().flatten()[:30]
    empty = few[-1:].expand(25)
    spoilt = labelled.nonzero().flatten()[50:53]
    probes = [Probe(layers=1).build("loss", SETTING, seed=3) for _ in range(2)]
    for seed in range(5):
        hidden = hidden_of(MICRO, seed)
        losses = task_loss(hidden)
        nothing = torch.cat([torch.zeros(30), torch.full((25,), torch.nan), torch.tensor([torch.nan, torch.inf, 1e39])])
        hidden[spoilt] = torch.nan
        for probe, index, nll in (
            (probes[0], few, losses[few]),
            (probes[1], torch.cat([few, unlabelled, empty, spoilt]), torch.cat([losses[few], nothing])),
        ):
            scores_of(probe, seen_of(hidden))
            probe.learn(MICRO, index, nll)
    for name, tensor in probes[0].tensors().items():
        torch.testing.assert_close(probes[1].tensors()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_a_micro_batch_without_labels_leaves_the_standardisation_alone() -> None:
    probe = Probe(layers=1).build("loss", SETTING, seed=3)
    empty = replace(MICRO, labels_BT=torch.full_like(MICRO.labels_BT, -100))
    index = torch.arange(MICRO.labels_BT.numel())

    def learn_nothing() -> Tensor:
        scores_of(probe, seen_of(hidden_of(MICRO, 0)), empty)
        probe.learn(empty, index, torch.zeros(len(index)))
        return probe.tensors()["moments"].clone()

    assert torch.equal(learn_nothing(), torch.zeros(3))
    teach(probe, range(3))
    before = probe.tensors()["moments"].clone()
    assert 6.8 < before[0] < 7.2 and torch.equal(learn_nothing(), before)


# The table of the last epoch


def test_the_table_remembers_the_last_loss_of_every_position() -> None:
    scorer = StaleScores().build("loss", SETTING, seed=0)
    g = torch.Generator().manual_seed(5)
    known: dict[int, float] = {}
    last_ids = set()
    for step in range(12):
        micro = packed(LENGTHS, width=21, seed=step)
        n = micro.labels_BT.numel()
        last_ids.add(int(micro.position_ids_BT.max()))
        for scores, labels, ids in zip(
            scores_of(scorer, None, micro).flatten().tolist(),
            micro.labels_BT.flatten().tolist(),
            micro.position_ids_BT.flatten().tolist(),
            strict=True,
        ):
            hardest = torch.finfo(torch.float32).max
            assert scores == (-math.inf if labels < 0 else known.get(ids, hardest))
        index = torch.randperm(n, generator=g)[: n // 4].sort().values
        # Empty slots at the end repeat a position; what was computed there is nobody's loss.
        index = torch.cat([index, index[-1:], index[-1:]])
        nll = torch.where(micro.labels_BT.flatten()[index] >= 0, torch.rand(len(index), generator=g) * 9, 0.0)
        nll[-2:] = torch.nan
        scorer.learn(micro, index, nll)
        for i, loss in zip(index[:-2].tolist(), nll.tolist(), strict=False):
            if micro.labels_BT.flatten()[i] >= 0:
                known[int(micro.position_ids_BT.flatten()[i])] = loss
        table = scorer.tensors()["losses"][:POSITIONS]
        expected = [known.get(i, math.inf) for i in range(POSITIONS)]
        assert table.tolist() == expected
    # Padding, of id -1, never stands for the last position, which was visited too.
    assert max(last_ids) == POSITIONS - 1 and -1 not in known and 50 < len(known) < POSITIONS


def test_a_loss_that_is_not_a_number_is_forgotten() -> None:
    scorer = StaleScores().build("loss", SETTING, seed=0)
    index = torch.arange(POSITIONS)
    scorer.learn(MICRO, index, torch.full((POSITIONS,), 2.0))
    before = scores_of(scorer, None)
    for bad in (torch.nan, torch.inf):
        scorer.learn(MICRO, index, torch.full((POSITIONS,), bad))
        assert torch.equal(scores_of(scorer, None), before)


def test_everything_is_kept_until_an_epoch_was_seen() -> None:
    part = SelectedTokens(0.25, "loss", plan="before", router=StaleScores(), curriculum=Curriculum(0.0, 0.0))
    router = part.build(0, SETTING)

    def ratio(tokens: int) -> float:
        return router.ratio(Progress(5, 50.0, 100.0, tokens))

    assert [ratio(n) for n in (0, 1, POSITIONS - 1)] == [1.0] * 3
    assert [ratio(n) for n in (POSITIONS, 10 * POSITIONS)] == [0.25] * 2


def test_positions_never_seen_are_kept_first() -> None:
    router = SelectedTokens(0.5, "loss", plan="before", router=StaleScores()).build(0, SETTING)
    index = torch.arange(POSITIONS)
    unseen = (MICRO.labels_BT >= 0) & (torch.arange(21) % 3 == 0)
    visited = index[~unseen.flatten()]
    router.learn(MICRO, visited, torch.full((len(visited),), 1e30))
    route = router.route(None, MICRO, 0.5)
    assert route is not None
    for row, first in enumerate(unseen):
        kept = set(route.index_BK[row][route.filled_BK[row]].tolist())
        assert set(first.nonzero().flatten().tolist()) <= kept


# What a real step teaches


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("plan", ["before", "dense"])
def test_a_step_teaches_the_losses_of_kept_positions(plan: str, checkpointing: bool) -> None:
    """And nothing from empty slots, which repeat the last position of a row whether it was kept or not."""
    model = small_model("llama")
    expected = true_scores(lens_logits(model, MICRO, 3), MICRO.labels_BT)["loss"].flatten()
    tokens = SelectedTokens(0.25, "loss", plan=plan, router=StaleScores())
    run_pass = Pass(Recipe("x", tokens=tokens), Adapter(model, checkpointing), 0, POSITIONS)
    table, ids = run_pass.router.tensors()["losses"], MICRO.position_ids_BT.flatten()
    run_pass(MICRO, torch.tensor(1 / MICRO.labelled), 0.25)
    # Of positions that nobody has seen, the first ones of a row are kept.
    kept = []
    for row, labels in enumerate(MICRO.labels_BT):
        labelled = (labels >= 0).nonzero().flatten().tolist()
        kept += [21 * row + t for t in labelled[: max(1, round(0.25 * len(labelled)))]]
    assert sum(bool(row[-1] >= 0) for row in MICRO.labels_BT) >= 3
    assert {i for i in range(POSITIONS) if table[i].isfinite()} == {int(ids[i]) for i in kept}
    torch.testing.assert_close(table[ids[kept]].double(), expected[kept], rtol=1e-4, atol=1e-4)
