"""What changes a built model: other norms, fused or folded ones, a norm on the input, and the
report of what was done."""
