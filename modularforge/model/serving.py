"""What vLLM and SGLang ask of a mixture's shape before they split it over processes of tensor parallelism.

Read from their sources (`docs/assembly.md` names the commits), since neither runs without a GPU. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SERVERS = ("vLLM", "SGLang")
DEGREES = (1, 2, 4, 8)


def refusal(values: Mapping[str, Any], server: str, processes: int) -> str | None:
    """Why a server does not split a model with this config.json over so many processes; None where it does.

    The vocabulary is no obstacle: both pad it to multiples of 64.
    """
    is_qwen = values["model_type"] == "qwen3_moe"
    heads, kv_heads, head_width = (values[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    ffn_width = values["moe_intermediate_size" if is_qwen else "intermediate_size"]
    if server == "SGLang" and not is_qwen and values["hidden_size"] != heads * head_width:
        return f"its width, {values['hidden_size']}, is not that of {heads} heads of {head_width}"
    if heads % processes:
        return f"{heads} heads"
    if kv_heads % processes and processes % kv_heads:
        return f"{kv_heads} key-value heads"  # as many to each, or each to as many
    if ffn_width % processes:
        return f"an FFN of {ffn_width}"
    if is_qwen and processes > values["num_experts"]:
        return f"{values['num_experts']} experts"
    return None


def degrees(values: Mapping[str, Any], server: str) -> list[int]:
    """The usual numbers of processes that a server splits a model over."""
    return [processes for processes in DEGREES if refusal(values, server, processes) is None]


def describe_serving(values: Mapping[str, Any]) -> str:
    """`vLLM on 1 or 2 processes (not 4: 10 heads); SGLang on none (its width, 528, is not that of 10 heads of 64)`."""
    return "; ".join(_of_server(values, server) for server in SERVERS)


def _of_server(values: Mapping[str, Any], server: str) -> str:
    found = degrees(values, server)
    refused = next((processes for processes in DEGREES if processes not in found), None)
    taken = " or ".join(filter(None, [", ".join(map(str, found[:-1])), str(found[-1])])) if found else "none"
    if refused is None:
        return f"{server} on {taken} processes"
    why = refusal(values, server, refused)
    return f"{server} on {taken} ({f'not {refused}: ' if found else ''}{why})"
