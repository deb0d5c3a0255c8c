"""Training and evaluation behind ``tools/``, one room an engine: ``classification`` (timm), ``torchvision`` and
``detectron2``; what they share is in ``run`` and ``data``, what is made of runs in ``reports``."""
