"""The training runs of ``tools/train_net.py``. Everything in this folder but ``evaluation.py`` needs detectron2, and
only that tool imports it."""
