"""The attributes that every result measured on a model carries."""

from __future__ import annotations

from typing import Any

from mechhier.models.hooked import Hooked
from mechhier.models.loading import bos_token_id, model_info, weight_processing
from mechhier.results import INTERVAL, netcdf_safe, versions


def provenance(hooked: Hooked, *, phenomenon: str, definition: str, source: str, **settings: Any) -> dict[str, Any]:
    """Attributes of a result: what was measured, by whose definition, on which model, with which settings."""
    info = model_info(hooked.model)
    described = (
        {}
        if info is None
        else {
            "model": info.name,
            "architecture": info.architecture,
            "checkpoint_step": info.step,
            "revision": info.revision,
        }
    )
    return netcdf_safe(
        {
            "phenomenon": phenomenon,
            "definition": definition,
            "source": source,
            "model": getattr(hooked.cfg, "model_name", "unknown"),
            **described,
            "processing": weight_processing(hooked.model),
            "verification": str(hooked.verification),
            "bos": _bos(hooked),
            "model_class": type(hooked.model).__name__,
            "dtype": str(hooked.dtype).removeprefix("torch."),
            "device": str(hooked.device),
            "interval": INTERVAL.format(samples="sequences"),
            **settings,
            **versions(),
        }
    )


def _bos(hooked: Hooked) -> str:
    """What is put in front of text and of random tokens."""
    bos = bos_token_id(hooked.model)
    return "none" if bos is None else str(hooked.model.tokenizer.convert_ids_to_tokens(bos))
