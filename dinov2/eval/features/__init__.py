"""Features of labelled cells: the encoders that make them, the extraction and the files that hold them."""

from dinov2.eval.features.store import DEFAULT_KIND, PATCHES, Features, read_features, stored_kinds, write_features

__all__ = ["DEFAULT_KIND", "PATCHES", "Features", "read_features", "stored_kinds", "write_features"]
