"""What training a model takes in memory, as its shapes say. An estimate: nothing is allocated and nothing measured."""

from __future__ import annotations

from cggr_ray.race import RaceSpec

# A parameter: bf16 itself and its gradient, a float32 master and one or two float32 moments.
STATE_BYTES = 2 + 2 + 4 + 8


def state_bytes(parameters: int) -> int:
    return parameters * STATE_BYTES


def activation_bytes(spec: RaceSpec, rows: int) -> int:
    """What so many rows keep for their backward in bf16, 2 (6 D + 3 F) bytes a token and layer."""
    config = spec.model.config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    per_token = 2 * (6 * config.hidden_size + 3 * inner) * config.num_hidden_layers
    return rows * spec.data.row_tokens * int(per_token)
