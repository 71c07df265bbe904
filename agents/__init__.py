"""VLA models, and what turns one into a TorchRL policy. Knows no simulator."""
