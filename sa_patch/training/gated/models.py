"""Llama and Qwen3 with gated attention, which ``from_pretrained`` loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sa_patch.errors import UserError
from sa_patch.kernels import check_backend
from sa_patch.patterns import SA, SWA
from sa_patch.patterns.permutation import hash_key
from sa_patch.training.gated.attention import IMPLEMENTATION, GatedSA, LlamaGatedSA, Qwen3GatedSA
from sa_patch.training.own_attention import refuse_dropout, register_model, stock_values


class GatedConfig(PreTrainedConfig):
    """What a gated model's configuration adds to that of its family.

    Args:
        sa_window, sa_seed, sa_circular: see `sa_patch.patterns.SA`; the seed is that of
            evaluation, and training draws its permutations from it.
        swa_window: see `sa_patch.patterns.SWA`.
        attention_backend: kernel backend, or "auto"; with gradients "banded", "flex" or
            "reference".
    """

    sa_window: int = 256
    swa_window: int = 256
    sa_seed: int = 0
    sa_circular: bool = True
    attention_backend: str = "auto"


class GatedLlamaConfig(GatedConfig, LlamaConfig):
    """Llama's configuration with `GatedConfig`."""

    model_type = "gated_sa_llama"


class GatedQwen3Config(GatedConfig, Qwen3Config):
    """Qwen3's configuration with `GatedConfig`."""

    model_type = "gated_sa_qwen3"


class GatedCausalLM(PreTrainedModel):
    """What the gated models share: a mixin for a causal LM of transformers.

    Every forward pass in training mode draws fresh permutations for all layers, seeded by a hash of
    the configuration's `sa_seed` and the number of such passes before it. That number is a buffer,
    saved with the model, so that resumed training draws what it would have drawn without the stop.
    In evaluation mode the permutations are those of `sa_seed`.
    """

    attention_class: type[GatedSA]

    def __init__(self, config: Any) -> None:
        _check(config)
        config._attn_implementation = IMPLEMENTATION
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = self.attention_class(config, index)
        self.register_buffer("training_passes", torch.zeros((), dtype=torch.int64))
        # Again, to initialize the new modules; the others keep their weights.
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if module is self:
            # Uninitialized memory where the checkpoint of another model lacks the buffer.
            torch.nn.init.zeros_(self.training_passes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers' class.

        The seed is an argument of the layers, so that a layer that gradient checkpointing computes
        again in the backward pass draws the same permutations.
        """
        if self.training and kwargs.get("permutation_seed") is None:
            kwargs["permutation_seed"] = hash_key(self.config.sa_seed, int(self.training_passes))
            self.training_passes += 1
        return super().forward(*args, **kwargs)


class GatedLlamaForCausalLM(GatedCausalLM, LlamaForCausalLM):
    """Llama with `GatedSA` in every layer."""

    config_class = GatedLlamaConfig
    attention_class = LlamaGatedSA


class GatedQwen3ForCausalLM(GatedCausalLM, Qwen3ForCausalLM):
    """Qwen3 with `GatedSA` in every layer."""

    config_class = GatedQwen3Config
    attention_class = Qwen3GatedSA


_FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (GatedLlamaConfig, GatedLlamaForCausalLM),
    "qwen3": (GatedQwen3Config, GatedQwen3ForCausalLM),
}


def gated_config(
    config: PreTrainedConfig,
    window: int,
    *,
    swa_window: int | None = None,
    seed: int = 0,
    circular: bool = True,
    backend: str = "auto",
) -> PreTrainedConfig:
    """The configuration of a gated model, from that of a Llama or Qwen3 model.

    Args:
        config: a `LlamaConfig` or `Qwen3Config`, which is left as it is.
        window: of both branches, or of SA alone where `swa_window` is given.
        seed, circular: see `sa_patch.patterns.SA`.
        backend: kernel backend, or "auto".

    Raises:
        UserError: for another family, or a value that is not allowed.
    """
    if config.model_type not in _FAMILIES:
        raise UserError(
            f"gated attention is for models of the families {' and '.join(_FAMILIES)}, "
            f"got {config.model_type!r}"
        )
    own = {
        "sa_window": window,
        "swa_window": window if swa_window is None else swa_window,
        "sa_seed": seed,
        "sa_circular": circular,
        "attention_backend": backend,
    }
    gated: PreTrainedConfig = _FAMILIES[config.model_type][0](**stock_values(config), **own)
    _check(gated)
    return gated


def gated_model(
    source: PreTrainedConfig | PreTrainedModel, window: int, **options: Any
) -> PreTrainedModel:
    """A Llama or Qwen3 with gated attention in every layer.

    Args:
        source: a configuration, for random weights from torch's global generator; or a model,
            whose weights are copied, and only the gates are new.
        window, options: see `gated_config`.

    Raises:
        UserError: see `gated_config`.
    """
    stock = source.config if isinstance(source, PreTrainedModel) else source
    config = gated_config(stock, window, **options)
    model: PreTrainedModel = _FAMILIES[stock.model_type][1](config)
    if isinstance(source, PreTrainedModel):
        model.to(device=source.device, dtype=source.dtype)
        missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
        new = [name for name in missing if "gate_proj" not in name and name != "training_passes"]
        if new or unexpected:
            raise UserError(
                f"the weights do not fit a stock {stock.model_type} model: {new + unexpected}"
            )
        model.train(source.training)
    return model


def gate_layers(model: PreTrainedModel) -> Sequence[GatedSA]:
    """The gated attention modules of a model, in the order of the layers."""
    return [module for module in model.modules() if isinstance(module, GatedSA)]


def _check(config: Any) -> None:
    """Raise `UserError` for values with which no model should be built."""
    SA(config.sa_window, seed=config.sa_seed, circular=config.sa_circular)
    SWA(config.swa_window)
    check_backend(config.attention_backend)
    refuse_dropout(config, "gated")
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise UserError(
            "this configuration has sliding-window layers of its own; "
            "set use_sliding_window to false"
        )


for _config, _model in _FAMILIES.values():
    register_model(_config, _model)
