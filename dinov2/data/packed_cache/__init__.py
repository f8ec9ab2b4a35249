"""Pictures decoded and resized once, kept in memory-mapped files: `PackedCache`."""

from dinov2.data.packed_cache.cache import PackedCache, Plan, Summary, Verification, describe, describe_plan

__all__ = ["PackedCache", "Plan", "Summary", "Verification", "describe", "describe_plan"]
