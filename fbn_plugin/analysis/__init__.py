"""What the papers measure of a network beside its accuracy: functions of models, tensors and batches."""
