"""Training of torchvision's detectors, behind ``tools/train_detection.py``."""
