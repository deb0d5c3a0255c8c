"""Image classification with timm's models, behind ``tools/train_classification.py``."""
