"""What a training loop calls: groups of parameters, initial weights, population statistics, balanced batches, and modes
of evaluation."""
