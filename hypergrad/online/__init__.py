"""The online tuner: hyperparameters move while the model trains."""
