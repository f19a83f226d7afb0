"""The transition stage: update rules of optimizers, and the state that they act on."""
