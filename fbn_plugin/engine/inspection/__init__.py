"""Models and images from anywhere, for tools that look into a network without training it."""
