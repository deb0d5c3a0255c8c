"""The training runs of ``tools/train_net.py``. Everything in this folder but ``evaluation.py`` needs detectron2, and
only that tool imports it; but where somebody has imported detectron2, ``resolve_dataset`` asks ``registered.py``."""
