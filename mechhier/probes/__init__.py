"""Interventions on any hooked model; knows nothing of grammars or phenomena."""

from mechhier.probes.attention import patterns, reduce_patterns
from mechhier.probes.hooked import Hook, Hooked, SiteName

__all__ = ["Hook", "Hooked", "SiteName", "patterns", "reduce_patterns"]
