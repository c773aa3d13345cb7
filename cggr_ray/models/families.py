"""The model families: where each keeps its embeddings, norms and matrices, and how its decoder block is put together.

A block of every supported family is the same chain with parts left out:

    x1 = norm1(h);  q, k, v = x1 W_qkv (+ b);  q, k = rope(norm_q(q), norm_k(k));  o = attention(q, k, v)
    m = h + post1(o W_o);  x2 = norm2(m);  f = act(x2 W_gate) * (x2 W_up) or act(x2 W_up);  h' = m + post2(f W_down)

`BlockShape` says which parts there are, `BlockWeights` holds a layer's tensors, `Family` reads both from a Hugging Face
model. Shapes: N positions, D width, H heads, G key-value heads, E head width, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NormKind = Literal["rms", "rms_plus_one", "layer"]
# Of FlashAttention, and of attention for kept queries.
WIDEST_HEAD = 256
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma3", "gpt2")
# How the name ends of a matrix that holds the projections of queries, keys and values, in equal parts: GPT-2's.
FUSED_NAME = "attn.c_attn.weight"
DROPOUTS = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop")
NO_DROPOUT = "accepted: 0 when the model is built, runs repeat exactly"


@dataclass(frozen=True)
class BlockShape:
    """The structure of a block. Equal shapes share compiled code."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    """Factor of the attention logits."""
    window: int | None
    """Keys that a query sees at most, itself included; None sees its whole document."""
    norm: NormKind
    eps: float
    activation: str
    rotary: str | None
    """Which rotary embedding: the layer type's name where a family has several, `default`, or None."""


class BlockWeights(NamedTuple):
    """A layer's tensors. A matrix is (out, in) unless the family is GPT-2, whose views are transposed to that."""

    norm1: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    norm2: Tensor
    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    norm1_bias: Tensor | None = None
    norm2_bias: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    post1: Tensor | None = None
    post2: Tensor | None = None


class Family:
    """A causal LM of a supported family, read part by part.

    Raises:
        ValueError: the family is not supported, it is no causal LM itself (a body without a head, another library's
            wrapper around one), or it has what would change from run to run (dropout) or what the blocks here do not
            have (soft-capped logits, cross attention, a bias of the head).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_config(model.config)
        self.model, self.config = model, model.config.get_text_config()
        self.name = model.config.model_type
        body: Any = getattr(model, "transformer" if self.name == "gpt2" else "model", None)
        self.body: Any = getattr(body, "language_model", body)
        self._check_parts()

    def _check_parts(self) -> None:
        head = self.model.get_output_embeddings()
        if head is None or not hasattr(self.body, "h" if self.name == "gpt2" else "layers"):
            raise ValueError(f"{type(self.model).__name__}; accepted: a causal LM of transformers")
        if getattr(head, "bias", None) is not None:
            raise ValueError(f"{head} as the head; accepted: a head without bias")
        # A module drops as it was built, also where its setting became 0 since.
        for name, module in self.body.named_modules():
            rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
            if rate:
                raise ValueError(f"dropout of {name} = {rate}; {NO_DROPOUT}")

    @property
    def layers(self) -> Sequence[nn.Module]:
        return list(self.body.h if self.name == "gpt2" else self.body.layers)

    @property
    def embedding(self) -> nn.Module:
        module: nn.Module = self.model.get_input_embeddings()
        return module

    @property
    def head_VD(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    @property
    def norm(self) -> nn.Module:
        module: nn.Module = self.body.ln_f if self.name == "gpt2" else self.body.norm
        return module

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Hidden states that enter the first layer, of any batch of tokens."""
        hidden: Tensor = self.embedding(tokens)
        return hidden + self.body.wpe(positions) if self.name == "gpt2" else hidden

    def input_parameters(self) -> list[nn.Parameter]:
        """What `embed` reads."""
        modules = (self.embedding, self.body.wpe) if self.name == "gpt2" else (self.embedding,)
        return [p for module in modules for p in module.parameters()]

    def rotary(self, hidden: Tensor, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(cos, sin) of every kind of rotary embedding that a layer may ask for; none for learned positions."""
        if self.name == "gpt2":
            return {}
        embedding = self.body.rotary_emb
        if self.name in ("gemma3", "gemma3_text"):
            return {kind: embedding(hidden, positions, kind) for kind in sorted(set(self.config.layer_types))}
        return {"default": embedding(hidden, position_ids=positions)}

    def shape(self, index: int) -> BlockShape:
        return (_gpt2_shape if self.name == "gpt2" else _llama_shape)(self, index)

    def weights(self, index: int) -> BlockWeights:
        layer: Any = self.layers[index]
        return _gpt2_weights(layer) if self.name == "gpt2" else _llama_weights(layer, self.name.startswith("gemma3"))


def check_config(config: Any) -> None:
    """What can be said of a model from its configuration, before anything of it is read.

    Raises:
        ValueError: another family, or what `Family` does not take.
    """
    text = config.get_text_config()
    if config.model_type not in SUPPORTED:
        raise ValueError(f"model family {config.model_type!r}; accepted: {', '.join(SUPPORTED)}")
    dropped = ", ".join(f"{key} = {rate}" for key in DROPOUTS if (rate := getattr(text, key, 0.0)))
    if dropped:
        raise ValueError(f"{dropped}; {NO_DROPOUT}")
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if width > WIDEST_HEAD:
        raise ValueError(f"head_dim = {width}; accepted: at most {WIDEST_HEAD}, attention has no wider kernel")
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "add_cross_attention"):
        if getattr(text, key, None):
            raise ValueError(f"{key} = {getattr(text, key)}; accepted: a model without it")
    if getattr(text, "use_bidirectional_attention", False):
        raise ValueError("use_bidirectional_attention = True; accepted: False, a causal model")


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function of a configuration's name."""
    from transformers.activations import ACT2FN

    found: Callable[[Tensor], Tensor] = ACT2FN[name]
    return found


def _llama_shape(family: Family, index: int) -> BlockShape:
    config, layer = family.config, family.layers[index]
    attention: Any = layer.self_attn
    gemma = family.name.startswith("gemma3")
    window = config.sliding_window if family.name == "mistral" else getattr(attention, "sliding_window", None)
    return BlockShape(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        window=window,
        norm="rms_plus_one" if gemma else "rms",
        eps=config.rms_norm_eps,
        activation=config.hidden_activation if gemma else config.hidden_act,
        rotary=attention.layer_type if gemma else "default",
    )


def _llama_weights(layer: Any, gemma: bool) -> BlockWeights:
    attention, mlp = layer.self_attn, layer.mlp
    # Llama calls the norm before the MLP "post attention"; Gemma has norms on both sides of each half.
    norm2 = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
    return BlockWeights(
        norm1=layer.input_layernorm.weight,
        q=attention.q_proj.weight,
        k=attention.k_proj.weight,
        v=attention.v_proj.weight,
        o=attention.o_proj.weight,
        norm2=norm2.weight,
        up=mlp.up_proj.weight,
        down=mlp.down_proj.weight,
        gate=mlp.gate_proj.weight,
        q_bias=attention.q_proj.bias,
        k_bias=attention.k_proj.bias,
        v_bias=attention.v_proj.bias,
        o_bias=attention.o_proj.bias,
        gate_bias=mlp.gate_proj.bias,
        up_bias=mlp.up_proj.bias,
        down_bias=mlp.down_proj.bias,
        q_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        post1=layer.post_attention_layernorm.weight if gemma else None,
        post2=layer.post_feedforward_layernorm.weight if gemma else None,
    )


def _gpt2_shape(family: Family, index: int) -> BlockShape:
    config = family.config
    width = config.n_embd // config.n_head
    scale = width**-0.5 if config.scale_attn_weights else 1.0
    return BlockShape(
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=width,
        scale=scale / (index + 1) if config.scale_attn_by_inverse_layer_idx else scale,
        window=None,
        norm="layer",
        eps=config.layer_norm_epsilon,
        activation=config.activation_function,
        rotary=None,
    )


def _gpt2_weights(layer: Any) -> BlockWeights:
    attention, mlp = layer.attn, layer.mlp
    q, k, v = attention.c_attn.weight.mT.chunk(3)
    q_bias, k_bias, v_bias = attention.c_attn.bias.chunk(3)
    return BlockWeights(
        norm1=layer.ln_1.weight,
        q=q,
        k=k,
        v=v,
        o=attention.c_proj.weight.mT,
        norm2=layer.ln_2.weight,
        up=mlp.c_fc.weight.mT,
        down=mlp.c_proj.weight.mT,
        norm1_bias=layer.ln_1.bias,
        norm2_bias=layer.ln_2.bias,
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        o_bias=attention.c_proj.bias,
        up_bias=mlp.c_fc.bias,
        down_bias=mlp.c_proj.bias,
    )
