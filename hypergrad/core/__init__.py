"""What every other package builds on: losses, graphs, hyperparameters, tensors."""
