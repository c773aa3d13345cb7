"""Small models and optimizers for the tests of the optimizer, and a rule that hides nothing."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cggr_ray.models.adapter import Adapter
from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.optimizer import Optimizer
from cggr_ray.optim.rule import Rule
from cggr_ray.optim.schedules import Linear
from cggr_ray.optim.state_formats import BFloat16, Int8Blockwise
from cggr_ray.progress import Progress

CPU = torch.device("cpu")
STEADY = Linear(warmup_tokens=0, floor=1.0)
PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
EIGHT, SIXTEEN = Int8Blockwise(), BFloat16()
EIGHT_ADAMW = AdamW(state=EIGHT, weight_decay=0.1)
# Half of each of the larger matrices of `wide`, so that the states are large enough for 8 bits.
HALF = {"rank": 48, "largest_fraction": 0.5}
OPTIMIZERS = {
    "muon8": Optimizer(matrix=Muon(state=EIGHT, weight_decay=0.1), schedule=STEADY),
    "adamw8": Optimizer(matrix=EIGHT_ADAMW, rest=EIGHT_ADAMW, schedule=STEADY),
    "normuon": Optimizer(matrix=Muon(row_beta=0.95, weight_decay=0.1, cautious=True), schedule=STEADY),
    "normuon8": Optimizer(matrix=Muon(row_beta=0.95, state=EIGHT), rest=EIGHT_ADAMW, schedule=STEADY),
    "muon16": Optimizer(matrix=Muon(state=SIXTEEN), rest=AdamW(state=SIXTEEN), schedule=STEADY),
    "galore_adamw16": Optimizer(matrix=GaLore(AdamW(state=SIXTEEN), **HALF), schedule=STEADY),
    "galore": Optimizer(matrix=GaLore(Muon(weight_decay=0.1), **HALF), schedule=STEADY),
    "galore8": Optimizer(matrix=GaLore(Muon(state=EIGHT), **HALF, basis=EIGHT), schedule=STEADY),
    "galore_adamw": Optimizer(matrix=GaLore(AdamW(), **HALF), schedule=STEADY),
    "galore_adamw8": Optimizer(matrix=GaLore(EIGHT_ADAMW, **HALF, basis=EIGHT), schedule=STEADY),
}


def at(step=0, fraction=0.0, tokens=1):
    return Progress(step, train_seconds=100 * fraction, budget_seconds=100.0, tokens_seen=tokens)


@dataclass(frozen=True)
class Plain(Rule):
    """Gradient descent: makes what the optimizer does around a rule visible."""

    lr: float = 1.0
    weight_decay: float = 0.0

    def init_state(self, weights):
        return {}

    def direction(self, grad, state, finite, workers=None):
        return grad

    def without_momentum(self, grad, state):
        return grad


def llama(tied=True, dtype=torch.float32, **values):
    # A vocabulary as large as the width: the embedding has the shape of a hidden matrix.
    small = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "use_cache": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(small | heads | {"tie_word_embeddings": tied} | values))).to(dtype)


def wide(dtype=torch.float32):
    """Matrices of 96 x 96 and more, but for two of 48 x 96 a layer, which are too short to be projected."""
    return llama(dtype=dtype, vocab_size=96, hidden_size=96, intermediate_size=128)


def build(model, config):
    adapter = Adapter(model)
    return config.build(adapter.named_parameters(), adapter.hidden_names(), CPU)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_gradients(model, seed, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        drawn = torch.randn(p.shape, generator=generator)
        p.grad = ((drawn + 0.1 * p.detach().float()) * factor).to(p.dtype)


def snapshot(optimizer):
    return {f"{n}.{k}": t.clone() for n, s in optimizer.stacks.items() for k, t in s.tensors().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
