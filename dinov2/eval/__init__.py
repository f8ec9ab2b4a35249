"""What the features are worth: extraction, then one module per protocol, which maps arrays to metrics."""
