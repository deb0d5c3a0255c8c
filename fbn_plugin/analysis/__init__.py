"""What the papers measure of a network: functions of models, tensors and loaders, with no engine in them."""
