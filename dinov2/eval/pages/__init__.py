"""Pages to open in a browser: their frame, charts and sections."""
