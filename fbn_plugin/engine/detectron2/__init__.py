"""The training runs of ``tools/train_net.py``. Everything in this folder needs detectron2, and only that tool imports
it."""
