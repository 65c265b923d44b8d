"""Keys, pytrees, models, the parameter-use interpreter and likelihoods: nothing Bayesian yet."""
